//! A Beta distribution of sigma itself, without a shift.

use statrs::distribution::{Beta as BetaDistribution, ContinuousCDF};
use tch::Tensor;

use super::{Distribution, Sampling};
use crate::rng::Draws;

pub(super) const SAMPLING: Sampling = Sampling {
    distribution: |parameters| {
        Box::new(Beta { alpha: parameters.beta_alpha, beta: parameters.beta_beta })
    },
    is_shifted: false,
    is_mixed: false,
};

/// A Beta distribution.
///
/// Source: NeMo AutoModel 0.6.0, which added it for Qwen-Image-Edit.
#[derive(Clone, Copy, Debug)]
pub struct Beta {
    /// Above 0.
    pub alpha: f64,
    /// Above 0.
    pub beta: f64,
}

impl Distribution for Beta {
    fn draw(&self, draws: &Draws<'_>, batch: i64) -> Tensor {
        draws.beta(self.alpha, self.beta, batch)
    }

    fn quantile(&self, p: f64) -> f64 {
        BetaDistribution::new(self.alpha, self.beta)
            .expect("settings keep both above zero")
            .inverse_cdf(p)
    }
}
