//! Warm-up, the peak for most of the run, a straight line to the floor at its end.

use super::{LrSchedule, progress, visit_warmup, warmup};
use crate::settings::{Keys, Settings};

/// Source: Hu et al. 2024, arXiv:2404.06395, section 4 (warmup-stable-decay).
#[derive(Clone, Debug, PartialEq)]
pub struct WarmupStableDecay {
    warmup_steps: u64,
    decay_share: f64,
    min_factor: f64,
}

impl Default for WarmupStableDecay {
    fn default() -> Self {
        WarmupStableDecay { warmup_steps: 0, decay_share: 0.2, min_factor: 0.0 }
    }
}

impl Settings for WarmupStableDecay {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        visit_warmup(keys, &mut self.warmup_steps);
        keys.number("decay_share", &mut self.decay_share, 0.0..=1.0, "Share of the run, at its end, that falls to the floor.");
        keys.number("min_factor", &mut self.min_factor, 0.0..=1.0, "Share of the peak that is left at the last step.");
    }
}

impl LrSchedule for WarmupStableDecay {
    fn factor(&self, step: u64, max_steps: u64) -> f64 {
        let decay_begins = max_steps - (max_steps as f64 * self.decay_share) as u64;
        if step <= decay_begins {
            return warmup(step, self.warmup_steps).unwrap_or(1.0);
        }
        1.0 - (1.0 - self.min_factor) * progress(step, decay_begins, max_steps)
    }
}
