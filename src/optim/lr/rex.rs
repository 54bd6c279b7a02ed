//! A slow fall that steepens towards the end of the run, after a warm-up.

use super::{LrSchedule, RiseAndFall};
use crate::settings::settings;

settings! {
    /// `[lr_scheduler.rex]`.
    ///
    /// Source: Chen, Wolfe & Kyrillidis 2021, arXiv:2107.04197, section 3.
    pub struct Rex {
        /// The rise and the floor.
        shape: RiseAndFall, as flat;
    }
}

impl LrSchedule for Rex {
    fn warmup_steps(&self) -> u64 {
        self.shape.warmup_steps
    }

    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        self.shape.factor(step, max_steps, |progress| (1.0 - progress) / (1.0 - 0.5 * progress))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_fall_leaves_two_thirds() {
        let schedule = Rex { shape: RiseAndFall { warmup_steps: 0, min_factor: 0.0 } };
        let found = [1, 51, 101].map(|step| schedule.factor(step, 101));
        let expected = [1.0, 2.0 / 3.0, 0.0];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-15), "{found:?}");
    }
}
