//! Half a cosine from the peak to the floor, after a warm-up.

use std::f64::consts::PI;

use super::{LrSchedule, RiseAndFall};
use crate::settings::{Keys, Settings};

/// Source: Loshchilov & Hutter 2017, arXiv:1608.03983, one period without restart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cosine(RiseAndFall);

impl Settings for Cosine {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        self.0.visit(keys);
    }
}

impl LrSchedule for Cosine {
    fn warmup_steps(&self) -> u64 {
        self.0.warmup_steps
    }

    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        self.0.factor(step, max_steps, |progress| 0.5 * (1.0 + (PI * progress).cos()))
    }
}
