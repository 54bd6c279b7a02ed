//! The noise levels at which samples are judged: sigmas, or quantiles of the law by which training
//! draws them.

use super::settings::{FlowMatchingSettings, SigmaWindow};
use super::time_shift::{shifted_number, unshifted};
use super::timestep_sampling::{Distribution, Uniform};
use super::timesteps::{FLOOR, probability_below};

/// Noise levels, in the order in which they are named.
#[derive(Clone, Debug, PartialEq)]
pub enum Levels {
    Sigmas(Vec<f64>),
    /// Each above 0 and below 1.
    Quantiles(Vec<f64>),
}

impl Levels {
    /// Returns the sigmas or quantiles themselves.
    pub fn values(&self) -> &[f64] {
        match self {
            Levels::Sigmas(values) | Levels::Quantiles(values) => values,
        }
    }

    /// Returns `sigma` or `quantile`.
    pub fn word(&self) -> &'static str {
        match self {
            Levels::Sigmas(_) => "sigma",
            Levels::Quantiles(_) => "quantile",
        }
    }

    /// Returns each value as a text of at least two decimals: `0.10`, `0.125`.
    pub fn labels(&self) -> Vec<String> {
        let label = |value: &f64| {
            let (short, exact) = (format!("{value:.2}"), value.to_string());
            if exact.len() > short.len() { exact } else { short }
        };
        self.values().iter().map(label).collect()
    }

    /// Returns the first value that is named twice.
    pub fn named_twice(&self) -> Option<f64> {
        let values = self.values();
        let again = |(place, value): (usize, &f64)| values[..place].contains(value);
        values.iter().enumerate().find(|found| again(*found)).map(|(_, value)| *value)
    }

    /// Returns the sigmas of samples of so many image tokens, on which the shift may depend.
    pub fn sigmas(&self, settings: &FlowMatchingSettings, image_tokens: i64) -> Vec<f64> {
        match self {
            Levels::Sigmas(sigmas) => sigmas.clone(),
            Levels::Quantiles(quantiles) => {
                let law = Law::new(settings, image_tokens);
                quantiles.iter().map(|quantile| law.sigma(*quantile)).collect()
            }
        }
    }
}

/// The law of the sigmas of samples of one shape: shifted, mixed and within the sigma window, as
/// [`sample_timesteps`](super::sample_timesteps) draws them.
struct Law<'s> {
    settings: &'s FlowMatchingSettings,
    /// None: `u` is sigma itself.
    shift: Option<f64>,
    /// Distributions of `u`, each with its share of the draws.
    parts: Vec<(f64, Box<dyn Distribution>)>,
}

impl<'s> Law<'s> {
    fn new(settings: &'s FlowMatchingSettings, image_tokens: i64) -> Self {
        let sampling = settings.timestep_sampling;
        let uniform = match settings.use_sigma_noise {
            false => 1.0,
            true if sampling.is_mixed => settings.distribution.mix_uniform_ratio,
            true => 0.0,
        };
        let configured = (sampling.distribution)(&settings.distribution);
        let parts: [(f64, Box<dyn Distribution>); 2] =
            [(uniform, Box::new(Uniform)), (1.0 - uniform, configured)];
        Law {
            settings,
            shift: settings.shifts().then(|| settings.shift(image_tokens)),
            parts: parts.into_iter().filter(|(share, _)| *share > 0.0).collect(),
        }
    }

    /// Returns the sigma below which a draw falls with this probability.
    fn sigma(&self, probability: f64) -> f64 {
        let u = match &self.parts[..] {
            [(_, only)] => {
                let (low, high) = self.window(only.as_ref());
                only.quantile(low + (high - low) * probability)
            }
            _ => self.mixed(probability),
        };
        let sigma = self.shift.map_or(u, |shift| shifted_number(u.max(FLOOR), shift));
        sigma.clamp(self.settings.sigma_min, self.settings.sigma_max)
    }

    /// Inverts the distribution function of the mixture by bisection.
    fn mixed(&self, probability: f64) -> f64 {
        let below = |u: f64| -> f64 {
            let part = |(share, part): &(f64, Box<dyn Distribution>)| {
                let (low, high) = self.window(part.as_ref());
                let below = probability_below(part.as_ref(), u).clamp(low, high);
                share * (below - low) / (high - low)
            };
            self.parts.iter().map(part).sum()
        };
        let (mut low, mut high) = (0.0, 1.0);
        // Beyond the precision of f32, which sigma has.
        for _ in 0..40 {
            let middle = 0.5 * (low + high);
            if below(middle) < probability { low = middle } else { high = middle }
        }
        0.5 * (low + high)
    }

    /// Returns the probabilities between which a distribution is drawn from.
    fn window(&self, distribution: &dyn Distribution) -> (f64, f64) {
        let FlowMatchingSettings { sigma_min, sigma_max, sigma_window, .. } = *self.settings;
        let to_u = |sigma: f64| self.shift.map_or(sigma, |shift| unshifted(sigma, shift));
        match sigma_window {
            SigmaWindow::Clamp => (0.0, 1.0),
            SigmaWindow::Truncate => [sigma_min, sigma_max]
                .map(|sigma| probability_below(distribution, to_u(sigma)))
                .into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::time_shift::ShiftType;
    use crate::flow::timestep_sampling::DistributionParameters;
    use crate::flow::{TimestepSampling, sample_timesteps};
    use crate::rng::{Key, Purpose, Stream};
    use crate::settings::Choice;

    const DRAWS: i64 = 20_000;

    /// Compares quantiles with the shares of draws below them.
    fn assert_is_the_law(settings: &FlowMatchingSettings, tokens: i64, what: &str) {
        let keys = (0..DRAWS as u64).map(|id| Key::new(9, Purpose::Test).scope(id)).collect();
        let stream = Stream::PerSample(keys);
        let sampled = sample_timesteps(settings, &stream.open(), DRAWS, tokens, None);
        let drawn = Vec::<f32>::try_from(sampled.sigma).expect("f32");
        let quantiles = vec![0.05, 0.25, 0.5, 0.75, 0.95];
        let sigmas = Levels::Quantiles(quantiles.clone()).sigmas(settings, tokens);
        for (quantile, sigma) in quantiles.into_iter().zip(sigmas) {
            // Draws at the edge of a clamped window are on both sides of a quantile there.
            let count = |below: fn(f32, f32) -> bool| {
                drawn.iter().filter(|drawn| below(**drawn, sigma as f32)).count() as f64
                    / DRAWS as f64
            };
            let (below, up_to) = (count(|a, b| a < b - 1e-6), count(|a, b| a <= b + 1e-6));
            // Standard deviation of an empirical probability: sqrt(p (1 - p) / n) < 0.0036; four of
            // them.
            assert!(
                below - 0.0145 < quantile && quantile < up_to + 0.0145,
                "{what}: {quantile} is {sigma}, between {below} and {up_to}"
            );
        }
    }

    #[test]
    fn quantiles_are_those_of_what_training_draws() {
        for (word, sampling) in TimestepSampling::ALL {
            for (ratio, sigma_window) in
                [(0.0, SigmaWindow::Clamp), (0.4, SigmaWindow::Clamp), (0.4, SigmaWindow::Truncate)]
            {
                for use_sigma_noise in [true, false] {
                    let settings = FlowMatchingSettings {
                        timestep_sampling: *sampling,
                        distribution: DistributionParameters {
                            mix_uniform_ratio: ratio,
                            ..DistributionParameters::default()
                        },
                        use_sigma_noise,
                        sigma_window,
                        sigma_min: 0.2,
                        sigma_max: 0.97,
                        ..FlowMatchingSettings::default()
                    };
                    assert_is_the_law(&settings, 1024, &format!("{word} {ratio} {sigma_window:?}"));
                }
            }
        }
    }

    #[test]
    fn quantiles_follow_each_samples_own_shift() {
        let settings =
            FlowMatchingSettings { shift_type: ShiftType::Flux, ..FlowMatchingSettings::default() };
        for tokens in [256, 4096] {
            assert_is_the_law(&settings, tokens, &format!("{tokens} tokens"));
        }
        let median = |tokens| Levels::Quantiles(vec![0.5]).sigmas(&settings, tokens)[0];
        // Half of the draws are below 1/2 before the shift, in every mixture of symmetric laws.
        let expected = |mu: f64| mu.exp() / (mu.exp() + 1.0);
        assert!((median(256) - expected(0.5)).abs() < 1e-6, "{}", median(256));
        assert!((median(4096) - expected(1.15)).abs() < 1e-6, "{}", median(4096));
    }

    #[test]
    fn sigmas_are_what_they_are_and_labels_tell_values_apart() {
        let levels = Levels::Sigmas(vec![0.1, 0.125, 1.0, 0.3]);
        assert_eq!(levels.sigmas(&FlowMatchingSettings::default(), 7), [0.1, 0.125, 1.0, 0.3]);
        assert_eq!(levels.labels(), ["0.10", "0.125", "1.00", "0.30"]);
        assert_eq!(levels.named_twice(), None);
        assert_eq!(Levels::Quantiles(vec![0.1, 0.5, 0.1]).named_twice(), Some(0.1));
    }
}
