//! Every `u` alike.

use tch::Tensor;

use super::{Distribution, Sampling};
use crate::rng::Draws;

/// Uniform numbers need no mixing with uniform numbers.
pub(super) const SAMPLING: Sampling =
    Sampling { distribution: |_| Box::new(Uniform), is_shifted: true, is_mixed: false };

/// The uniform distribution.
#[derive(Clone, Copy, Debug)]
pub struct Uniform;

/// `[batch]` f32 in `[0, 1)`, one draw.
pub fn uniform(draws: &Draws<'_>, batch: i64) -> Tensor {
    draws.uniform(&[batch])
}

impl Distribution for Uniform {
    fn draw(&self, draws: &Draws<'_>, batch: i64) -> Tensor {
        uniform(draws, batch)
    }

    fn quantile(&self, p: f64) -> f64 {
        p
    }
}
