//! A Beta distribution of sigma itself, without a shift.

use statrs::distribution::{Beta as BetaDistribution, ContinuousCDF};
use tch::Tensor;

use super::Distribution;
use crate::rng::Draws;

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
