//! The peak, after a warm-up.

use super::{LrSchedule, warmup};
use crate::settings::settings;

settings! {
    /// `[lr_scheduler.constant]`.
    pub struct Constant {
        /// Steps of linear rise to the peak.
        warmup_steps: u64 = 0, in 0..;
    }
}

impl LrSchedule for Constant {
    fn warmup_steps(&self) -> u64 {
        self.warmup_steps
    }

    fn factor(&self, step: u64, _max_steps: u64) -> f64 {
        warmup(step, self.warmup_steps).unwrap_or(1.0)
    }
}
