//! The third function of the reference's `time_shift_utils`: one draw of timesteps, nothing
//! shifted.

use tch::Tensor;

use super::{mode_map, uniform};
use crate::rng::Draws;
use crate::settings::choice;

choice! {
    /// The distribution that [`compute_density_for_timestep_sampling`] draws from, under the
    /// reference's names.
    #[derive(Default)]
    pub enum WeightingScheme {
        /// Every timestep alike.
        #[default]
        "uniform" => Uniform,
        /// The logistic function of a normal.
        "logit_normal" => LogitNormal,
        /// The density of [`mode_map`].
        "mode" => Mode,
    }
}

/// Arguments of [`compute_density_for_timestep_sampling`] with the reference's defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Density {
    pub weighting_scheme: WeightingScheme,
    /// Mean of the normal under `logit_normal`.
    pub logit_mean: f64,
    /// Standard deviation of the normal under `logit_normal`.
    pub logit_std: f64,
    /// How far `mode` bends.
    pub mode_scale: f64,
}

impl Default for Density {
    fn default() -> Self {
        Density {
            weighting_scheme: WeightingScheme::default(),
            logit_mean: 0.0,
            logit_std: 1.0,
            mode_scale: 1.29,
        }
    }
}

/// One draw of timesteps, `[batch]` f32 in `[0, 1]`; `mode` is not clamped.
pub fn compute_density_for_timestep_sampling(
    density: Density,
    batch: i64,
    draws: &Draws<'_>,
) -> Tensor {
    match density.weighting_scheme {
        WeightingScheme::Uniform => uniform(draws, batch),
        WeightingScheme::LogitNormal => {
            draws.normal(density.logit_mean, density.logit_std, &[batch]).sigmoid()
        }
        WeightingScheme::Mode => mode_map(&uniform(draws, batch), density.mode_scale),
    }
}
