//! Half a cosine from the peak to the floor, after a warm-up.

use std::f64::consts::PI;

use super::{LrSchedule, RiseAndFall};
use crate::settings::settings;

settings! {
    /// `[lr_scheduler.cosine]`.
    ///
    /// Source: Loshchilov & Hutter 2017, arXiv:1608.03983, one period without restart.
    pub struct Cosine {
        /// The rise and the floor.
        shape: RiseAndFall, as flat;
    }
}

impl LrSchedule for Cosine {
    fn warmup_steps(&self) -> u64 {
        self.shape.warmup_steps
    }

    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        self.shape.factor(step, max_steps, |progress| 0.5 * (1.0 + (PI * progress).cos()))
    }
}
