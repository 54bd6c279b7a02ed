//! A straight line from the peak to the floor, after a warm-up.

use super::{LrSchedule, RiseAndFall};
use crate::settings::{Keys, Settings};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Linear(RiseAndFall);

impl Settings for Linear {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        self.0.visit(keys);
    }
}

impl LrSchedule for Linear {
    fn warmup_steps(&self) -> u64 {
        self.0.warmup_steps
    }

    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        self.0.factor(step, max_steps, |progress| 1.0 - progress)
    }
}
