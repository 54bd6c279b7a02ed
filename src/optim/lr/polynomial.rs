//! A power of what is left of the run, from the peak to the floor, after a warm-up.

use super::{LrSchedule, RiseAndFall};
use crate::settings::{above_up_to, settings};

settings! {
    /// `[lr_scheduler.polynomial]`.
    pub struct Polynomial {
        /// The rise and the floor.
        shape: RiseAndFall, as flat;
        /// Exponent of the share of the run that is left; 1 is the straight line.
        power: f64 = 2.0, in above_up_to(0.0, 100.0);
    }
}

impl LrSchedule for Polynomial {
    fn warmup_steps(&self) -> u64 {
        self.shape.warmup_steps
    }

    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        self.shape.factor(step, max_steps, |progress| (1.0 - progress).powf(self.power))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_fall_leaves_a_half_to_the_power() {
        let shape = RiseAndFall { warmup_steps: 1, min_factor: 0.2 };
        let schedule = Polynomial { shape, power: 3.0 };
        let found = [1, 51, 101].map(|step| schedule.factor(step, 101));
        let expected = [1.0, 0.2 + 0.8 * 0.125, 0.2];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-15), "{found:?}");
    }
}
