//! How noisy each training sample becomes.
//!
//! `u` is drawn from the distribution of the mode, floored, shifted towards noise and kept within
//! the sigma window.

use tch::Tensor;

use super::settings::{FlowMatchingSettings, SigmaWindow};
use super::time_shift::{shifted, unshifted};
use super::timestep_sampling::{Distribution, TimestepSampling, Uniform};
use crate::rng::{Draws, Toss};
use crate::settings::Choice;

/// `u` is never below this, so that 1/u stays finite.
pub(super) const FLOOR: f64 = 1e-5;

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
    /// Name of the sampling in the logs; the reference's.
    pub method: &'static str,
    /// Shift towards noise by which sigma was drawn; 1 if it was drawn without one.
    pub shift: f64,
}

/// Draws a batch's noise levels in the reference's order: the mixing coin, if any, then one draw of
/// `u`. `image_tokens`: that of each of its samples.
pub fn sample_timesteps(
    settings: &FlowMatchingSettings,
    draws: &Draws<'_>,
    batch: i64,
    image_tokens: i64,
    strata: Option<&Strata>,
) -> SampledTimesteps {
    let sampling = settings.timestep_sampling;
    let shift = settings.shifts().then(|| settings.shift(image_tokens));
    let drawing = Drawing { settings, draws, batch, strata, shift };
    let (sigma, method) = if !settings.use_sigma_noise {
        (drawing.sigma(&Uniform), "uniform_no_shift")
    } else if sampling.is_mixed {
        mixed(&drawing)
    } else {
        (drawing.sigma(drawing.configured().as_ref()), sampling.word())
    };
    let sigma = sigma.clamp(settings.sigma_min, settings.sigma_max);
    let timesteps = &sigma * settings.num_train_timesteps as f64;
    SampledTimesteps { sigma, timesteps, method, shift: shift.unwrap_or(1.0) }
}

/// Sigma by the configured distribution, or by the uniform one where the mixing coin says so.
fn mixed(drawing: &Drawing<'_>) -> (Tensor, &'static str) {
    let settings = drawing.settings;
    let word = settings.timestep_sampling.word();
    let configured = drawing.configured();
    let ratio = settings.distribution.mix_uniform_ratio;
    if ratio <= 0.0 {
        return (drawing.sigma(configured.as_ref()), word);
    }
    match drawing.draws.coin(ratio, drawing.batch) {
        Toss::Same(true) => (drawing.sigma(&Uniform), TimestepSampling::Uniform.word()),
        Toss::Same(false) => (drawing.sigma(configured.as_ref()), word),
        // Both are drawn whatever the coins say: later draws of a sample must not depend on its
        // neighbours' coins.
        Toss::Each(coins) => {
            let (uniform, other) = (drawing.sigma(&Uniform), drawing.sigma(configured.as_ref()));
            (uniform.where_self(&coins.to_device(uniform.device()), &other), word)
        }
    }
}

/// One draw of sigma, before the clamp.
#[derive(Clone, Copy)]
struct Drawing<'a> {
    settings: &'a FlowMatchingSettings,
    draws: &'a Draws<'a>,
    batch: i64,
    strata: Option<&'a Strata>,
    /// None: `u` is sigma itself.
    shift: Option<f64>,
}

impl Drawing<'_> {
    /// The distribution that the settings name.
    fn configured(&self) -> Box<dyn Distribution> {
        (self.settings.timestep_sampling.distribution)(&self.settings.distribution)
    }

    /// Sigma by `distribution`, `[batch]` f32.
    fn sigma(&self, distribution: &dyn Distribution) -> Tensor {
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
        let within =
            Vec::<f32>::try_from(self.draws.host_uniform(&[self.batch])).expect("f32 draws");
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
pub(super) fn probability_below(distribution: &dyn Distribution, u: f64) -> f64 {
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
    use crate::flow::timestep_sampling::DistributionParameters;
    use crate::rng::{Key, Purpose, Stream};

    fn settings(sampling: TimestepSampling) -> FlowMatchingSettings {
        FlowMatchingSettings {
            timestep_sampling: sampling,
            distribution: DistributionParameters {
                mix_uniform_ratio: 0.0,
                ..DistributionParameters::default()
            },
            ..FlowMatchingSettings::default()
        }
    }

    fn sigmas(settings: &FlowMatchingSettings, batch: i64, strata: Option<&Strata>) -> Vec<f32> {
        let stream = Stream::Batch(Key::new(11, Purpose::Test));
        let sampled = sample_timesteps(settings, &stream.open(), batch, 4096, strata);
        Vec::try_from(sampled.sigma).expect("f32")
    }

    #[test]
    fn draws_follow_the_quantile_function() {
        for (word, sampling) in TimestepSampling::ALL {
            let settings = settings(*sampling);
            let distribution = (sampling.distribution)(&settings.distribution);
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
            let distribution = (sampling.distribution)(&settings.distribution);
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
