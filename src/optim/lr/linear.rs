//! A straight line from the peak to the floor, after a warm-up.

use super::{LrSchedule, RiseAndFall};
use crate::settings::settings;

settings! {
    /// `[lr_scheduler.linear]`.
    pub struct Linear {
        /// The rise and the floor.
        shape: RiseAndFall, as flat;
    }
}

impl LrSchedule for Linear {
    fn warmup_steps(&self) -> u64 {
        self.shape.warmup_steps
    }

    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        self.shape.factor(step, max_steps, |progress| 1.0 - progress)
    }
}
