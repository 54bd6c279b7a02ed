//! Modes of `timestep_sampling`: the distributions that `u` in `[0, 1]` is drawn from.
//!
//! Each mode is a file of its own and a line of the registry. Its distribution draws as the
//! reference does; its quantile function serves the two better behaviours, stratified timesteps and
//! truncated windows, which need `u` at a given probability.

mod beta;
mod density;
mod logit_normal;
mod mode;
mod uniform;

pub use beta::Beta;
pub use density::{Density, WeightingScheme, compute_density_for_timestep_sampling};
pub use logit_normal::LogitNormal;
pub use mode::{Mode, mode_map};
pub use uniform::{Uniform, uniform};

use tch::Tensor;

use crate::registry::registry;
use crate::rng::Draws;
use crate::settings::{above_up_to, settings};

/// A distribution of `u` on `[0, 1]`.
pub trait Distribution {
    /// `[batch]` f32 in one draw, equal to the reference's.
    fn draw(&self, draws: &Draws<'_>, batch: i64) -> Tensor;

    /// The `u` below which a draw falls with probability `p`; increasing in `p`.
    fn quantile(&self, p: f64) -> f64;
}

/// A mode of `timestep_sampling`.
pub struct Sampling {
    /// Makes the distribution of `u`.
    pub distribution: fn(&DistributionParameters) -> Box<dyn Distribution>,
    /// True if `u` is shifted towards noise; false if `u` is sigma itself.
    pub is_shifted: bool,
    /// True if `mix_uniform_ratio` replaces some draws by uniform ones.
    pub is_mixed: bool,
}

registry! {
    /// `timestep_sampling`, under the reference's names: one file, one line a mode.
    #[derive(Default)]
    pub enum TimestepSampling: Sampling by word {
        /// Every `u` alike.
        "uniform" => Uniform = uniform::SAMPLING,
        /// The logistic function of a normal.
        #[default]
        "logit_normal" => LogitNormal = logit_normal::SAMPLING,
        /// A density with a mode that a scale moves.
        "mode" => Mode = mode::SAMPLING,
        /// The reference's further name for the standard logit-normal.
        "lognorm" => Lognorm = logit_normal::STANDARD,
        /// The reference's other name for the standard logit-normal.
        "mix" => Mix = logit_normal::STANDARD,
        /// A Beta distribution of sigma itself.
        "beta" => Beta = beta::SAMPLING,
    }
}

settings! {
    /// Keys of `[flow_matching]` that choose among distributions of one kind.
    pub struct DistributionParameters {
        /// Mean of the normal under `logit_normal`.
        pub logit_mean: f64 = 0.0, in -10.0..=10.0;
        /// Standard deviation of the normal under `logit_normal`.
        pub logit_std: f64 = 1.0, in 0.0..=1000.0;
        /// Share of batches that draw u uniformly instead, in every mode but `beta`.
        pub mix_uniform_ratio: f64 = 0.1, in 0.0..=1.0;
        /// First parameter of `beta`.
        pub beta_alpha: f64 = 2.5, in above_up_to(0.0, 1000.0);
        /// Second parameter of `beta`.
        pub beta_beta: f64 = 1.5, in above_up_to(0.0, 1000.0);
    }
}
