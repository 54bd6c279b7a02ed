//! Progress of the run and the time it still takes: a bar on a terminal, occasional lines in a
//! file.

use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use crate::telemetry::console::Console;
use crate::telemetry::meters::{Throughput, duration_text};

/// Time between two plain progress lines, which gives a few hundred lines in an hour.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Steps over which the speed is averaged for the remaining time.
const SPEED_STEPS: usize = 100;

/// Shows a run's progress until it is dropped.
pub struct Progress {
    shown: Shown,
    step: u64,
    total: u64,
    speed: Throughput,
}

enum Shown {
    Nothing,
    Lines { last: Option<Instant> },
    Bar { bar: ProgressBar, console: Arc<Console> },
}

impl Progress {
    pub(super) fn nothing(total: u64, start: u64) -> Self {
        Progress::new(Shown::Nothing, total, start)
    }

    pub(super) fn lines(total: u64, start: u64) -> Self {
        Progress::new(Shown::Lines { last: None }, total, start)
    }

    pub(super) fn bar(console: &Arc<Console>, total: u64, start: u64) -> Self {
        let bar = console.show_bar(total, start);
        Progress::new(Shown::Bar { bar, console: Arc::clone(console) }, total, start)
    }

    fn new(shown: Shown, total: u64, start: u64) -> Self {
        Progress { shown, step: start, total, speed: Throughput::new(SPEED_STEPS) }
    }

    /// Reports that `step` steps are done. `message` is shown beside the progress, e.g. `loss
    /// 0.41`.
    pub fn advance(&mut self, step: u64, message: &str) {
        self.advance_at(Instant::now(), step, message);
    }

    fn advance_at(&mut self, now: Instant, step: u64, message: &str) {
        self.speed.record_at(now, step.saturating_sub(self.step) as f64);
        self.step = step;
        let tail = format!("{message}{}", self.time_left());
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar { bar, .. } => {
                bar.set_message(tail);
                bar.set_position(step);
            }
            Shown::Lines { last } => {
                let due = last.is_none_or(|last| now.duration_since(last) >= LINE_EVERY)
                    || step >= self.total;
                if due {
                    *last = Some(now);
                    let percent = step * 100 / self.total.max(1);
                    tracing::info!("step {step}/{} ({percent} %)  {tail}", self.total);
                }
            }
        }
    }

    /// Returns `  12 min left`; empty while the speed is unknown or when the end is reached.
    fn time_left(&self) -> String {
        let left = self.total.saturating_sub(self.step) as f64;
        match self.speed.per_second() {
            Some(speed) if left > 0.0 && speed > 0.0 => {
                format!("  {} left", duration_text(left / speed))
            }
            _ => String::new(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar { console, .. } = &self.shown {
            console.clear_bar();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::console::Page;

    #[test]
    fn a_bar_shows_step_message_and_time_left() {
        let page = Page::default();
        let console = Arc::new(Console::new(Box::new(page.clone()), false));
        let mut progress = Progress::bar(&console, 120, 20);
        let start = Instant::now();
        (21..=60).for_each(|step| {
            progress.advance_at(start + Duration::from_secs(step), step, "loss 0.41")
        });
        // The bar draws at most twice a second of real time, so its last state is drawn explicitly.
        if let Shown::Bar { bar, .. } = &progress.shown {
            bar.force_draw();
        }
        assert!(page.text().contains("60/120  loss 0.41  1 min left"), "{}", page.text());
    }

    #[test]
    fn time_left_counts_from_the_resumed_step() {
        let mut progress = Progress::nothing(2000, 1000);
        let start = Instant::now();
        (0..=10).for_each(|i| progress.advance_at(start + Duration::from_secs(i), 1000 + i, ""));
        assert_eq!(
            progress.time_left(),
            "  16 min left",
            "990 steps at one a second, not 1010 steps' worth of speed"
        );
    }
}
