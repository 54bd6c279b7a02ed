//! Warm-up, the peak for most of the run, a straight line to the floor at its end.

use super::{LrSchedule, progress, warmup};
use crate::settings::settings;

settings! {
    /// `[lr_scheduler.wsd]`.
    ///
    /// Source: Hu et al. 2024, arXiv:2404.06395, section 4 (warmup-stable-decay).
    pub struct WarmupStableDecay {
        /// Steps of linear rise to the peak.
        warmup_steps: u64 = 0, in 0..;
        /// Share of the run, at its end, that falls to the floor.
        decay_share: f64 = 0.2, in 0.0..=1.0;
        /// Share of the peak that is left at the last step.
        min_factor: f64 = 0.0, in 0.0..=1.0;
    }
}

impl LrSchedule for WarmupStableDecay {
    fn warmup_steps(&self) -> u64 {
        self.warmup_steps
    }

    /// The lower one of the rise and the fall: continuous also where the warm-up reaches into the
    /// decay.
    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        let decay_begins = max_steps - (max_steps as f64 * self.decay_share) as u64;
        let rise = warmup(step, self.warmup_steps).unwrap_or(1.0);
        let fall = 1.0 - (1.0 - self.min_factor) * progress(step, decay_begins, max_steps);
        if step <= decay_begins { rise } else { rise.min(fall) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(warmup_steps: u64, decay_share: f64, max_steps: u64) -> Vec<f64> {
        let schedule = WarmupStableDecay { warmup_steps, decay_share, min_factor: 0.0 };
        (1..=max_steps).map(|step| schedule.factor(step, max_steps)).collect()
    }

    #[test]
    fn a_warm_up_that_reaches_into_the_decay_leaves_no_leap() {
        for (warmup_steps, decay_share) in
            [(100, 0.2), (200, 0.2), (90, 0.2), (80, 0.2), (50, 1.0), (100, 1.0), (1, 0.0)]
        {
            let factors = factors(warmup_steps, decay_share, 100);
            // The steeper one of the two straight lines.
            let slope = (1.0 / warmup_steps as f64).max(1.0 / (100.0 * decay_share).max(1.0));
            let steepest =
                factors.windows(2).map(|pair| (pair[1] - pair[0]).abs()).fold(0.0, f64::max);
            assert!(
                steepest <= slope + 1e-12,
                "warm-up {warmup_steps}, decay {decay_share}: {steepest} in one step, at most {slope}"
            );
        }
        let factors = factors(100, 0.2, 100);
        assert_eq!((factors[79], factors[80], factors[99]), (0.8, 0.81, 0.0));
    }

    #[test]
    fn a_warm_up_that_ends_before_the_decay_reaches_the_peak_and_stays_there() {
        let factors = factors(20, 0.25, 100);
        assert_eq!((factors[9], factors[19], factors[74]), (0.5, 1.0, 1.0));
        assert!((factors[75] - 0.96).abs() < 1e-12 && factors[99] == 0.0, "{factors:?}");
    }
}
