//! A density with a mode that a scale moves.

use std::f64::consts::FRAC_PI_2;

use tch::Tensor;

use super::{Distribution, Sampling, uniform};
use crate::rng::Draws;

/// The scale of the reference's pipeline.
const SCALE: f64 = 1.29;

pub(super) const SAMPLING: Sampling =
    Sampling { distribution: |_| Box::new(Mode), is_shifted: true, is_mixed: true };

/// A uniform number mapped by [`mode_map`].
///
/// Source: Esser et al. 2024, arXiv:2403.03206, section 3.1 (mode sampling with heavy tails).
#[derive(Clone, Copy, Debug)]
pub struct Mode;

/// `1 − u − scale·(cos²(πu/2) − 1 + u)`; maps 0 to 1 and 1 to 0.
pub fn mode_map(u: &Tensor, scale: f64) -> Tensor {
    // The order of operations is the reference's: each rounds once.
    let bulge = (u * std::f64::consts::PI / 2.0).cos().square() - 1.0 + u;
    (u.ones_like() - u) - bulge * scale
}

impl Distribution for Mode {
    fn draw(&self, draws: &Draws<'_>, batch: i64) -> Tensor {
        mode_map(&uniform(draws, batch), SCALE).clamp(0.0, 1.0)
    }

    fn quantile(&self, p: f64) -> f64 {
        // The map falls from 1 to 0, so the p-quantile is its value at 1 − p.
        let u = 1.0 - p;
        (1.0 - u - SCALE * ((FRAC_PI_2 * u).cos().powi(2) - 1.0 + u)).clamp(0.0, 1.0)
    }
}
