//! Decides if a step may update the parameters: compares its loss with earlier ones, and limits the
//! number of skipped steps.
//!
//! The state belongs to the run and is saved with it, so that a resumed run decides as an unbroken
//! one.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::median::{Middle, median};

/// Number of losses that the next one is compared with.
const WINDOW: usize = 128;
/// Number of losses below which no comparison is made.
const ENOUGH: usize = 32;
/// Standard deviation of a normal distribution over its median absolute deviation.
const DEVIATIONS_PER_MAD: f64 = 1.4826;
/// Smallest assumed deviation, as a share of the median, so that a nearly constant loss does not
/// cause an alarm when it moves a little.
const LEAST_DEVIATION: f64 = 0.01;
/// Number of steps in which skipped ones are counted.
pub const BUDGET_STEPS: u64 = 100;

/// A run's recent losses and skipped steps.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Losses of applied steps, the newest last.
    losses: VecDeque<f64>,
    /// Skipped ones of the last [`BUDGET_STEPS`] steps.
    skipped: VecDeque<u64>,
    num_skipped: u64,
    /// The epoch, and the number of bad samples found in it so far.
    bad_samples: (u64, u64),
}

impl Guard {
    /// Returns how far a loss is above the usual, in robust standard deviations: the distance from
    /// the median of the losses before it, over their median absolute deviation. `None` while there
    /// are too few losses.
    ///
    /// Source: Rousseeuw & Hubert 2011, "Robust statistics for outlier detection", sections 2 and
    /// 3.
    pub fn height(&self, loss: f64) -> Option<f64> {
        if self.losses.len() < ENOUGH {
            return None;
        }
        let usual = self.median();
        let mad = upper_median(self.losses.iter().map(|other| (other - usual).abs()));
        let deviation =
            (DEVIATIONS_PER_MAD * mad).max(LEAST_DEVIATION * usual.abs()).max(f64::MIN_POSITIVE);
        Some((loss - usual) / deviation)
    }

    /// Returns the median of the recorded losses.
    pub fn median(&self) -> f64 {
        upper_median(self.losses.iter().copied())
    }

    /// Records the loss of a step that was applied.
    pub fn applied(&mut self, loss: f64) {
        // A NaN would make every later comparison false.
        if loss.is_finite() {
            self.losses.push_back(loss);
        }
        if self.losses.len() > WINDOW {
            self.losses.pop_front();
        }
    }

    /// Records that `step` is skipped. Returns the number of skipped steps among the last
    /// [`BUDGET_STEPS`], including this one.
    pub fn skip(&mut self, step: u64) -> u64 {
        self.num_skipped += 1;
        self.skipped.push_back(step);
        while self.skipped.front().is_some_and(|first| first + BUDGET_STEPS <= step) {
            self.skipped.pop_front();
        }
        self.skipped.len() as u64
    }

    /// Adds the bad samples of a step to those of its epoch. Returns the epoch's number of them.
    pub fn bad_samples(&mut self, epoch: u64, count: u64) -> u64 {
        let before = if self.bad_samples.0 == epoch { self.bad_samples.1 } else { 0 };
        self.bad_samples = (epoch, before + count);
        before + count
    }

    /// Returns the optimizer's own step number when the run is at `step`: data advance over a
    /// skipped step, the optimizer and its schedule do not.
    pub fn update_number(&self, step: u64) -> u64 {
        step - self.num_skipped
    }
}

/// Returns the upper median of an even number of values; 0 if there are none.
fn upper_median(values: impl Iterator<Item = f64>) -> f64 {
    median(values, Middle::Upper).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    /// Simulates a decaying loss with noise of a tenth of it, times `factor(step)`; returns the
    /// heights.
    fn heights(steps: u64, factor: impl Fn(u64) -> f64, takes_all: bool) -> Vec<f64> {
        let mut guard = Guard::default();
        let mut heights = Vec::new();
        for step in 0..steps {
            let noise = Key::new(1, Purpose::Test).step(step).below(0, 1000) as f64 / 1000.0 - 0.5;
            let loss = (1.0 + (-(step as f64) / 200.0).exp()) * (1.0 + 0.2 * noise) * factor(step);
            let height = guard.height(loss).unwrap_or_default();
            if takes_all || height < 10.0 {
                guard.applied(loss);
            }
            heights.push(height);
        }
        heights
    }

    #[test]
    fn a_thousand_clean_steps_raise_no_alarm() {
        let highest = heights(1000, |_| 1.0, true).into_iter().fold(0.0, f64::max);
        assert!(highest < 5.0, "{highest}");
    }

    #[test]
    fn one_step_of_fifty_times_the_loss_stands_out_and_the_next_does_not() {
        let heights = heights(500, |step| if step == 400 { 50.0 } else { 1.0 }, true);
        assert!(heights[400] > 100.0 && heights[401..].iter().all(|height| *height < 5.0));
    }

    #[test]
    fn twenty_high_steps_stand_out_each_and_a_slow_drift_does_not() {
        let high = |step| if (400..420).contains(&step) { 5.0 } else { 1.0 };
        assert!(heights(500, high, false)[400..420].iter().all(|height| *height > 10.0));
        let drift = heights(1000, |step| 1.0 + step as f64 / 500.0, true);
        assert!(drift.into_iter().all(|height| height < 5.0));
    }

    #[test]
    fn what_is_no_number_does_not_enter() {
        let mut guard = Guard::default();
        (0..100).for_each(|step| guard.applied(if step % 2 == 0 { f64::NAN } else { 1.0 }));
        assert_eq!((guard.losses.len(), guard.median()), (50, 1.0));
        assert!(guard.height(1.0).is_some_and(f64::is_finite));
    }

    #[test]
    fn skipped_steps_are_counted_for_a_hundred_steps_and_hold_the_optimizer_back() {
        let mut guard = Guard::default();
        assert_eq!([10, 50, 109, 110].map(|step| guard.skip(step)), [1, 2, 3, 3]);
        assert_eq!(guard.update_number(111), 107);
    }

    #[test]
    fn bad_samples_are_counted_by_epoch() {
        let mut guard = Guard::default();
        assert_eq!(
            [(0, 2), (0, 0), (0, 1), (1, 1)].map(|(epoch, count)| guard.bad_samples(epoch, count)),
            [2, 2, 3, 1]
        );
    }

    #[test]
    fn what_is_saved_is_the_same_to_the_last_bit() {
        let mut guard = Guard::default();
        (1..200).for_each(|step| guard.applied(1.0 / f64::from(step)));
        let text = serde_json::to_string(&guard).expect("numbers");
        assert_eq!(serde_json::from_str::<Guard>(&text).expect("its own text"), guard);
    }
}
