//! Every `u` alike.

use tch::Tensor;

use super::Distribution;
use crate::rng::Draws;

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
