//! The inverse square root of the step, after a warm-up; it does not depend on the run's length.

use super::{LrSchedule, warmup};
use crate::settings::settings;

settings! {
    /// `[lr_scheduler.inverse_sqrt]`.
    ///
    /// Source: Vaswani et al. 2017, arXiv:1706.03762, section 5.3, with the time scale of
    /// transformers' `get_inverse_sqrt_schedule`.
    pub struct InverseSqrt {
        /// Steps of linear rise to the peak.
        warmup_steps: u64 = 0, in 0..;
        /// Steps after the peak's in which the rate falls to 1/sqrt(2) of it; 0: warmup_steps, or
        /// 10000 without a warm-up.
        timescale: u64 = 0, in 0..;
        /// Lowest share of the peak.
        min_factor: f64 = 0.0, in 0.0..=1.0;
    }
}

impl InverseSqrt {
    fn timescale(&self) -> f64 {
        let chosen = [self.timescale, self.warmup_steps].into_iter().find(|steps| *steps > 0);
        chosen.unwrap_or(10_000) as f64
    }
}

impl LrSchedule for InverseSqrt {
    fn warmup_steps(&self) -> u64 {
        self.warmup_steps
    }

    fn factor(&self, step: u64, _max_steps: u64) -> f64 {
        warmup(step, self.warmup_steps).unwrap_or_else(|| {
            // The first step after the warm-up stands at the peak, also without a warm-up.
            let after = (step - self.warmup_steps.max(1)) as f64;
            (1.0 / (1.0 + after / self.timescale())).sqrt().max(self.min_factor)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_falls_with_the_root_of_the_step_down_to_the_floor() {
        let factors = |warmup_steps, timescale, min_factor| {
            let schedule = InverseSqrt { warmup_steps, timescale, min_factor };
            [50u64, 100, 200, 400].map(|step| schedule.factor(step, 400))
        };
        let root = 0.5f64.sqrt();
        assert_eq!(factors(100, 0, 0.0), [0.5, 1.0, root, 0.5]);
        assert_eq!(factors(100, 100, 0.6), [0.5, 1.0, root, 0.6]);
        let slow = InverseSqrt { warmup_steps: 0, timescale: 0, min_factor: 0.0 };
        assert_eq!((slow.factor(1, 400), slow.factor(10_001, 400)), (1.0, root));
    }
}
