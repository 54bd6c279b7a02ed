//! Half a cosine from the peak to the floor, after a warm-up; then back to the peak as often as is
//! wanted.

use std::f64::consts::PI;

use super::{LrSchedule, RiseAndFall};
use crate::settings::settings;

settings! {
    /// `[lr_scheduler.cosine]`.
    ///
    /// Source: Loshchilov & Hutter 2017, arXiv:1608.03983, with periods of one length.
    pub struct Cosine {
        /// The rise and the floor.
        shape: RiseAndFall, as flat;
        /// Returns from the floor to the peak, at equal distances within the run.
        restarts: u64 = 0, in 0..=1000;
    }
}

impl LrSchedule for Cosine {
    fn warmup_steps(&self) -> u64 {
        self.shape.warmup_steps
    }

    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        let period = |progress: f64| {
            let periods = progress * (self.restarts + 1) as f64;
            // The run ends at the floor, not at a further restart.
            if progress < 1.0 { periods.fract() } else { 1.0 }
        };
        self.shape.factor(step, max_steps, |progress| 0.5 * (1.0 + (PI * period(progress)).cos()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_divide_the_run_and_its_end_is_the_floor() {
        let shape = RiseAndFall { warmup_steps: 1, min_factor: 0.1 };
        let schedule = Cosine { shape, restarts: 1 };
        let found = [1, 51, 101, 151, 201].map(|step| schedule.factor(step, 201));
        let expected = [1.0, 0.55, 1.0, 0.55, 0.1];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
    }
}
