//! Ranges that numbers must lie in.

use std::ops::{Bound, RangeBounds};

/// A range of numbers, perhaps open at an end.
#[derive(Clone, Copy, Debug)]
pub struct Limits<T> {
    low: Bound<T>,
    high: Bound<T>,
}

impl<T: Copy + PartialOrd> Limits<T> {
    /// No limits.
    pub(super) fn none() -> Self {
        Limits { low: Bound::Unbounded, high: Bound::Unbounded }
    }

    pub(super) fn of(range: impl RangeBounds<T>) -> Self {
        Limits { low: range.start_bound().cloned(), high: range.end_bound().cloned() }
    }

    pub(super) fn contains(&self, value: T) -> bool {
        (self.low, self.high).contains(&value)
    }

    /// "0 is out of range; must be at least 1 and at most 64".
    pub(super) fn refusal(&self, value: T, shown: impl Fn(T) -> String) -> String {
        let low = match self.low {
            Bound::Included(low) => Some(format!("at least {}", shown(low))),
            Bound::Excluded(low) => Some(format!("above {}", shown(low))),
            Bound::Unbounded => None,
        };
        let high = match self.high {
            Bound::Included(high) => Some(format!("at most {}", shown(high))),
            Bound::Excluded(high) => Some(format!("below {}", shown(high))),
            Bound::Unbounded => None,
        };
        let bounds: Vec<String> = [low, high].into_iter().flatten().collect();
        let must = if bounds.is_empty() { "" } else { "; must be " };
        format!("{} is out of range{must}{}", shown(value), bounds.join(" and "))
    }
}

/// Bounds of a number that must be above `low`.
pub fn above(low: f64) -> (Bound<f64>, Bound<f64>) {
    (Bound::Excluded(low), Bound::Unbounded)
}

/// Bounds of a number that must be above `low` and at most `high`.
pub fn above_up_to(low: f64, high: f64) -> (Bound<f64>, Bound<f64>) {
    (Bound::Excluded(low), Bound::Included(high))
}
