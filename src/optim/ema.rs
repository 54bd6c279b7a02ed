//! `[ema]`: the exponential moving average of the trained weights.

use tch::{Kind, Tensor, no_grad};

use crate::optim::Average;
use crate::settings::{above, choice, settings};

choice! {
    /// Kind in which the average is kept.
    pub enum AverageKind {
        /// 32 bits.
        "float32" => Float32,
        /// 16 bits with the exponent of 32.
        "bfloat16" => Bfloat16,
    }
}

impl AverageKind {
    pub fn kind(self) -> Kind {
        match self {
            AverageKind::Float32 => Kind::Float,
            AverageKind::Bfloat16 => Kind::BFloat16,
        }
    }
}

settings! {
    /// `[ema]`: an exponential moving average of the trained weights, beside them.
    ///
    /// Source: `EMAModel` of diffusers 0.42.1, whose names and defaults these are, with its numbers
    /// to the last bit in float32.
    pub struct EmaSettings {
        /// Most that the average keeps of itself at a step, 0.9999 is usual; unset: there is no
        /// average.
        pub decay: Option<f64> = None, in 0.0..=1.0;
        /// Least that it keeps once it averages.
        pub min_decay: f64 = 0.0, in 0.0..=1.0;
        /// Averagings after which it begins to keep something; until then it is the weights.
        pub update_after_step: u64 = 0, in 0..;
        /// Rise by 1 − (1 + n/inv_gamma)^−power at averaging n, not by (1 + n)/(10 + n).
        pub use_ema_warmup: bool = false;
        /// Averagings by which the rise is slower; with use_ema_warmup.
        pub inv_gamma: f64 = 1.0, in above(0.0);
        /// Pace of the rise: 2/3 for a million steps, 3/4 for fewer; with use_ema_warmup.
        pub power: f64 = 2.0 / 3.0, in 0.0..=10.0;
        /// Kind in which the average is kept; bfloat16 loses every move below 1/512 of a weight.
        pub dtype: AverageKind = AverageKind::Float32;
        /// Updates from one averaging to the next.
        pub every_n_steps: u64 = 1, in 1..;
    }
}

impl EmaSettings {
    /// True if there is an average.
    pub fn is_on(&self) -> bool {
        self.decay.is_some()
    }

    /// Bytes of each parameter's average; 0 without one.
    pub fn bytes(&self) -> u64 {
        if self.is_on() { self.dtype.kind().elt_size_in_bytes() as u64 } else { 0 }
    }

    /// Share of its distance to the weights by which the average moves after an update, which is
    /// counted from 1 since the average began; none if it stays.
    pub fn share_after(&self, update: u64) -> Option<f64> {
        let most = self.decay.filter(|_| update.is_multiple_of(self.every_n_steps))?;
        Some(1.0 - self.decay_at(update / self.every_n_steps, most))
    }

    /// The decay at an averaging, which is counted from 1.
    fn decay_at(&self, averaging: u64, most: f64) -> f64 {
        let begun = averaging.saturating_sub(self.update_after_step.saturating_add(1));
        if begun == 0 {
            return 0.0;
        }
        let n = begun as f64;
        let rise = match self.use_ema_warmup {
            true => 1.0 - (1.0 + n / self.inv_gamma).powf(-self.power),
            false => (1.0 + n) / (10.0 + n),
        };
        rise.min(most).max(self.min_decay)
    }

    /// Returns what cannot be as it is, as `(key, reason)`.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let Some(most) = self.decay else {
            let what = "is not set, so that nothing else in [ema] has a meaning; 0.9999 is usual";
            let is_unused = *self == EmaSettings::default();
            return if is_unused { Vec::new() } else { vec![("ema.decay", what.into())] };
        };
        let mut problems = Vec::new();
        if self.min_decay > most {
            let what = format!("{} must not be above decay = {most}", self.min_decay);
            problems.push(("ema.min_decay", what));
        }
        let usual = EmaSettings::default();
        let of_warmup = [
            ("ema.inv_gamma", self.inv_gamma, usual.inv_gamma),
            ("ema.power", self.power, usual.power),
        ];
        for (key, value, usual) in of_warmup {
            if !self.use_ema_warmup && value != usual {
                problems.push((key, "has a meaning with use_ema_warmup = true only".into()));
            }
        }
        problems
    }
}

/// Moves an average of any kind towards the parameters, f32, by a share of its distance to them: by
/// libtorch's operators, with the rounding of diffusers' `EMAModel`.
pub fn advance(average: &mut Tensor, params: &Tensor, share: f64) {
    no_grad(|| *average -= (&*average - params) * share);
}

/// Returns the values as those in f32 or as those in bf16.
pub(super) fn by_kind(average: Option<Average<'_>>) -> (Option<&mut Tensor>, Option<&mut Tensor>) {
    match average.map(|average| average.values) {
        Some(values) if values.kind() == Kind::BFloat16 => (None, Some(values)),
        values => (values, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_the_weights_first_and_keeps_more_and_more() {
        let ema = EmaSettings { decay: Some(0.5), ..EmaSettings::default() };
        let shares: Vec<f64> = (1..=4).filter_map(|update| ema.share_after(update)).collect();
        assert_eq!(shares, [1.0, 1.0 - 2.0 / 11.0, 1.0 - 3.0 / 12.0, 1.0 - 4.0 / 13.0]);
        assert_eq!(ema.share_after(1000), Some(0.5));
        let late = EmaSettings { update_after_step: 3, ..ema };
        assert_eq!(
            [4, 5].map(|update| late.share_after(update)),
            [Some(1.0), Some(1.0 - 2.0 / 11.0)]
        );
    }

    /// Mean of the place of what an average consists of, and its standard deviation, as shares of
    /// the run.
    fn profile(ema: &EmaSettings, updates: u64) -> (f64, f64) {
        let mut moments = (0.0, 0.0);
        for update in 1..=updates {
            let share = ema.share_after(update).expect("each update is averaged");
            let place = update as f64 / updates as f64;
            moments.0 += share * (place - moments.0);
            moments.1 += share * (place * place - moments.1);
        }
        (moments.0, (moments.1 - moments.0 * moments.0).sqrt())
    }

    /// Karras et al. 2024, arXiv:2312.02696, section 3.1: weights that grow as the place's power γ
    /// have a width of 0.1 of the run at γ = 6.94, and of 0.05 at 16.97.
    #[test]
    fn a_warm_up_of_power_one_without_an_end_is_edm2s_power_function() {
        for (gamma, width) in [(6.94, 0.1), (16.97, 0.05)] {
            let ema = EmaSettings {
                decay: Some(1.0),
                use_ema_warmup: true,
                inv_gamma: gamma + 1.0,
                power: 1.0,
                ..EmaSettings::default()
            };
            let (mean, deviation) = profile(&ema, 20_000);
            // As far as a run's number of updates is finite.
            assert!((deviation - width).abs() < 1e-3 * width, "{deviation} for {width}");
            let expected = (gamma + 1.0) / (gamma + 2.0);
            assert!((mean - expected).abs() < 1e-3, "{mean} for {expected}");
        }
    }

    #[test]
    fn between_two_averagings_nothing_moves_and_nothing_is_counted() {
        let ema = EmaSettings { decay: Some(0.9), every_n_steps: 3, ..EmaSettings::default() };
        let dense = EmaSettings { every_n_steps: 1, ..ema.clone() };
        for update in 1..=12 {
            let expected = (update % 3 == 0).then(|| dense.share_after(update / 3)).flatten();
            assert_eq!(ema.share_after(update), expected, "{update}");
        }
        assert_eq!(EmaSettings::default().share_after(1), None, "there is no average");
    }

    #[test]
    fn settings_without_an_effect_are_refused() {
        let keys = |ema: EmaSettings| -> Vec<&str> {
            ema.problems().iter().map(|(key, _)| *key).collect()
        };
        let usual = EmaSettings::default;
        assert!(keys(usual()).is_empty());
        assert_eq!(keys(EmaSettings { every_n_steps: 2, ..usual() }), ["ema.decay"]);
        let on = || EmaSettings { decay: Some(0.9), ..usual() };
        assert!(keys(on()).is_empty());
        assert_eq!(keys(EmaSettings { min_decay: 0.95, ..on() }), ["ema.min_decay"]);
        assert_eq!(keys(EmaSettings { power: 0.75, ..on() }), ["ema.power"]);
        assert!(keys(EmaSettings { power: 0.75, use_ema_warmup: true, ..on() }).is_empty());
    }
}
