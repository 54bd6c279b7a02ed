//! The peak, after a warm-up.

use super::{LrSchedule, visit_warmup, warmup};
use crate::settings::{Keys, Settings};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Constant {
    warmup_steps: u64,
}

impl Settings for Constant {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        visit_warmup(keys, &mut self.warmup_steps);
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
