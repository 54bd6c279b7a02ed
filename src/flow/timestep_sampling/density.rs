//! The third function of the reference's `time_shift_utils`: one draw of timesteps, nothing shifted.

use tch::Tensor;

use super::{mode_map, uniform};
use crate::rng::Draws;

/// What [`compute_density_for_timestep_sampling`] draws from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Density {
    Uniform,
    LogitNormal { mean: f64, std: f64 },
    Mode { scale: f64 },
}

/// One draw of timesteps, `[batch]` f32 in `[0, 1]`; `Mode` is not clamped.
pub fn compute_density_for_timestep_sampling(density: Density, batch: i64, draws: &Draws<'_>) -> Tensor {
    match density {
        Density::Uniform => uniform(draws, batch),
        Density::LogitNormal { mean, std } => draws.normal(mean, std, &[batch]).sigmoid(),
        Density::Mode { scale } => mode_map(&uniform(draws, batch), scale),
    }
}
