//! How noisy each training sample becomes.
//!
//! A distribution of `u` in `[0, 1]` is drawn from, floored, shifted towards noise and kept within
//! the sigma window. Each distribution is a file of its own; it draws as the reference does, and
//! its quantile function serves the two better behaviours, stratified timesteps and truncated
//! windows, which need `u` at a given probability.

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

use super::settings::{FlowMatchingSettings, SigmaWindow};
use super::time_shift::{shifted, unshifted};
use crate::rng::{Draws, Toss};
use crate::settings::Choice;

/// `u` is never below this, so that 1/u stays finite.
const FLOOR: f64 = 1e-5;

/// A distribution of `u` on `[0, 1]`.
pub trait Distribution {
    /// `[batch]` f32 in one draw, equal to the reference's.
    fn draw(&self, draws: &Draws<'_>, batch: i64) -> Tensor;

    /// The `u` below which a draw falls with probability `p`; increasing in `p`.
    fn quantile(&self, p: f64) -> f64;
}

/// The reference's names of sampling modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimestepSampling {
    Uniform,
    #[default]
    LogitNormal,
    Mode,
    Lognorm,
    Mix,
    Beta,
}

impl Choice for TimestepSampling {
    const ALL: &'static [(&'static str, Self)] = &[
        ("uniform", TimestepSampling::Uniform),
        ("logit_normal", TimestepSampling::LogitNormal),
        ("mode", TimestepSampling::Mode),
        ("lognorm", TimestepSampling::Lognorm),
        ("mix", TimestepSampling::Mix),
        ("beta", TimestepSampling::Beta),
    ];
}

impl TimestepSampling {
    fn distribution(self, settings: &FlowMatchingSettings) -> Box<dyn Distribution> {
        match self {
            TimestepSampling::Uniform => Box::new(Uniform),
            TimestepSampling::LogitNormal => {
                Box::new(LogitNormal { mean: settings.logit_mean, std: settings.logit_std })
            }
            // The reference's two further names for the standard logit-normal.
            TimestepSampling::Lognorm | TimestepSampling::Mix => {
                Box::new(LogitNormal { mean: 0.0, std: 1.0 })
            }
            TimestepSampling::Mode => Box::new(Mode),
            TimestepSampling::Beta => {
                Box::new(Beta { alpha: settings.beta_alpha, beta: settings.beta_beta })
            }
        }
    }
}

/// Places of a batch's samples among equal slices of probability: sample `i` draws within slice
/// `positions[i]` of `total`.
#[derive(Clone, Debug, PartialEq)]
pub struct Strata {
    pub positions: Vec<u64>,
    pub total: u64,
}

/// Sampled noise levels of a batch.
#[derive(Debug)]
pub struct SampledTimesteps {
    /// `[B]` f32 in `[sigma_min, sigma_max]`.
    pub sigma: Tensor,
    /// `[B]` f32, sigma scaled to `[0, num_train_timesteps]`.
    pub timesteps: Tensor,
    /// What the logs call it; the reference's names.
    pub method: &'static str,
}

/// Draws a batch's noise levels in the reference's order: the mixing coin, if any, then one draw of
/// `u`.
pub fn sample_timesteps(
    settings: &FlowMatchingSettings,
    draws: &Draws<'_>,
    batch: i64,
    strata: Option<&Strata>,
) -> SampledTimesteps {
    let (sigma, method) = if !settings.use_sigma_noise {
        (Drawing { settings, draws, batch, strata, shift: None }.from(&Uniform), "uniform_no_shift")
    } else if settings.timestep_sampling == TimestepSampling::Beta {
        let beta = TimestepSampling::Beta.distribution(settings);
        (Drawing { settings, draws, batch, strata, shift: None }.from(beta.as_ref()), "beta")
    } else {
        mixed(&Drawing { settings, draws, batch, strata, shift: Some(settings.flow_shift) })
    };
    let sigma = sigma.clamp(settings.sigma_min, settings.sigma_max);
    let timesteps = &sigma * settings.num_train_timesteps as f64;
    SampledTimesteps { sigma, timesteps, method }
}

/// The configured distribution, or uniform where the mixing coin says so.
fn mixed(drawing: &Drawing<'_>) -> (Tensor, &'static str) {
    let settings = drawing.settings;
    let configured = settings.timestep_sampling;
    if configured == TimestepSampling::Uniform {
        return (drawing.from(&Uniform), configured.word());
    }
    let distribution = configured.distribution(settings);
    if settings.mix_uniform_ratio <= 0.0 {
        return (drawing.from(distribution.as_ref()), configured.word());
    }
    match drawing.draws.coin(settings.mix_uniform_ratio, drawing.batch) {
        Toss::Same(true) => (drawing.from(&Uniform), TimestepSampling::Uniform.word()),
        Toss::Same(false) => (drawing.from(distribution.as_ref()), configured.word()),
        // Both are drawn whatever the coins say: later draws of a sample must not depend on its
        // neighbours' coins.
        Toss::Each(coins) => {
            let (uniform, other) = (drawing.from(&Uniform), drawing.from(distribution.as_ref()));
            (uniform.where_self(&coins, &other), configured.word())
        }
    }
}

/// One draw of sigma, before the clamp.
struct Drawing<'a> {
    settings: &'a FlowMatchingSettings,
    draws: &'a Draws<'a>,
    batch: i64,
    strata: Option<&'a Strata>,
    /// None: `u` is sigma itself.
    shift: Option<f64>,
}

impl Drawing<'_> {
    fn from(&self, distribution: &dyn Distribution) -> Tensor {
        let truncated = self.settings.sigma_window == SigmaWindow::Truncate;
        let u = if truncated || self.strata.is_some() {
            self.at_probabilities(distribution, truncated)
        } else {
            distribution.draw(self.draws, self.batch)
        };
        match self.shift {
            Some(shift) => shifted(&u.clamp_min(FLOOR), shift),
            None => u,
        }
    }

    /// `u` by inverse distribution function, at probabilities drawn within each sample's stratum
    /// and the sigma window.
    fn at_probabilities(&self, distribution: &dyn Distribution, truncated: bool) -> Tensor {
        let (low, high) = if truncated { self.window(distribution) } else { (0.0, 1.0) };
        let within = Vec::<f32>::try_from(self.draws.uniform(&[self.batch])).expect("f32 draws");
        let place = |(sample, &jitter): (usize, &f32)| match self.strata {
            Some(strata) => {
                (strata.positions[sample] as f64 + f64::from(jitter)) / strata.total as f64
            }
            None => f64::from(jitter),
        };
        let quantile = |p: f64| distribution.quantile(low + (high - low) * p) as f32;
        Tensor::from_slice(&within.iter().enumerate().map(place).map(quantile).collect::<Vec<_>>())
    }

    /// The sigma window as probabilities of the distribution.
    fn window(&self, distribution: &dyn Distribution) -> (f64, f64) {
        let to_u = |sigma: f64| self.shift.map_or(sigma, |shift| unshifted(sigma, shift));
        let probability = |sigma: f64| probability_below(distribution, to_u(sigma));
        (probability(self.settings.sigma_min), probability(self.settings.sigma_max))
    }
}

/// The probability of a draw below `u`: the quantile function inverted by bisection to the last
/// bit.
fn probability_below(distribution: &dyn Distribution, u: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..64 {
        let middle = 0.5 * (low + high);
        if distribution.quantile(middle) < u { low = middle } else { high = middle }
    }
    if u >= 1.0 { 1.0 } else { low }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose, Stream};

    fn settings(sampling: TimestepSampling) -> FlowMatchingSettings {
        FlowMatchingSettings {
            timestep_sampling: sampling,
            mix_uniform_ratio: 0.0,
            ..FlowMatchingSettings::default()
        }
    }

    fn sigmas(settings: &FlowMatchingSettings, batch: i64, strata: Option<&Strata>) -> Vec<f32> {
        let stream = Stream::Batch(Key::new(11, Purpose::Test));
        let sampled = sample_timesteps(settings, &stream.open(), batch, strata);
        Vec::try_from(sampled.sigma).expect("f32")
    }

    #[test]
    fn draws_follow_the_quantile_function() {
        for (word, sampling) in TimestepSampling::ALL {
            let settings = settings(*sampling);
            let distribution = sampling.distribution(&settings);
            let stream = Stream::Batch(Key::new(5, Purpose::Test));
            let mut drawn =
                Vec::<f32>::try_from(distribution.draw(&stream.open(), 20_000)).expect("f32");
            drawn.sort_by(f32::total_cmp);
            for p in [0.05, 0.25, 0.5, 0.75, 0.95] {
                let probability = probability_below(
                    distribution.as_ref(),
                    f64::from(drawn[(p * 20_000.0) as usize]),
                );
                // Standard deviation of an empirical quantile's probability: sqrt(p (1-p) / n) <
                // 0.0036; four of them.
                assert!((probability - p).abs() < 0.0145, "{word} at {p}: {probability}");
            }
        }
    }

    #[test]
    fn a_clamped_window_piles_up_at_its_edge_and_a_truncated_one_does_not() {
        let clamped =
            FlowMatchingSettings { sigma_min: 0.875, ..settings(TimestepSampling::Uniform) };
        let at_edge = |sigmas: &[f32]| {
            sigmas.iter().filter(|&&sigma| sigma <= 0.875).count() as f64 / sigmas.len() as f64
        };
        // Shift 3: P(sigma <= 0.875) = 0.7 for uniform u.
        assert!((at_edge(&sigmas(&clamped, 20_000, None)) - 0.7).abs() < 0.015);
        let truncated = FlowMatchingSettings { sigma_window: SigmaWindow::Truncate, ..clamped };
        let sigmas = sigmas(&truncated, 20_000, None);
        assert!(at_edge(&sigmas) < 0.001);
        assert!(sigmas.iter().all(|sigma| (0.875..=1.0).contains(sigma)));
    }

    #[test]
    fn strata_put_one_sample_in_each_slice_of_probability() {
        for sampling in
            [TimestepSampling::Uniform, TimestepSampling::LogitNormal, TimestepSampling::Mode]
        {
            let settings = settings(sampling);
            let strata = Strata { positions: (0..64).rev().collect(), total: 64 };
            let distribution = sampling.distribution(&settings);
            for (sample, sigma) in sigmas(&settings, 64, Some(&strata)).into_iter().enumerate() {
                let p = probability_below(
                    distribution.as_ref(),
                    unshifted(f64::from(sigma), settings.flow_shift),
                );
                let slice = (p * 64.0 - (63 - sample) as f64).clamp(-1.0, 2.0);
                // f32 rounding of sigma near 1 moves p a little.
                assert!(
                    (-0.01..=1.01).contains(&slice),
                    "sample {sample} lies at {slice} of its slice"
                );
            }
        }
    }

    #[test]
    fn the_floor_keeps_sigma_above_zero() {
        let u = Tensor::from_slice(&[0.0f32]).clamp_min(FLOOR);
        for (shift, expected) in
            [(3.0, 2.99994e-5), (2.23, 2.22997e-5), (1.0, 1e-5), (0.5, 5.00003e-6)]
        {
            assert!((shifted(&u, shift).double_value(&[0]) / expected - 1.0).abs() < 1e-5);
        }
    }
}
