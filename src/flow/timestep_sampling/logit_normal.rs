//! The logistic function of a normal: most draws in the middle of the path.

use statrs::distribution::{ContinuousCDF, Normal};
use tch::Tensor;

use super::{Distribution, Sampling};
use crate::rng::Draws;

pub(super) const SAMPLING: Sampling = Sampling {
    distribution: |parameters| {
        Box::new(LogitNormal { mean: parameters.logit_mean, std: parameters.logit_std })
    },
    is_shifted: true,
    is_mixed: true,
};

/// The standard one, whatever the parameters are.
pub(super) const STANDARD: Sampling =
    Sampling { distribution: |_| Box::new(LogitNormal { mean: 0.0, std: 1.0 }), ..SAMPLING };

/// The logistic function of a normal.
///
/// Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
#[derive(Clone, Copy, Debug)]
pub struct LogitNormal {
    pub mean: f64,
    pub std: f64,
}

impl Distribution for LogitNormal {
    fn draw(&self, draws: &Draws<'_>, batch: i64) -> Tensor {
        draws.normal(self.mean, self.std, &[batch]).sigmoid()
    }

    fn quantile(&self, p: f64) -> f64 {
        // Without a spread every draw is the mean, also where the normal reaches infinity.
        let normal = if self.std == 0.0 {
            self.mean
        } else {
            self.mean + self.std * Normal::standard().inverse_cdf(p)
        };
        1.0 / (1.0 + (-normal).exp())
    }
}
