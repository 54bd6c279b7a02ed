//! Time spent in collectives.

use std::ops::Add;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Seconds spent in collectives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Seconds during which data were being transferred.
    pub communication_seconds: f64,
    /// The part of `communication_seconds` during which computation waited.
    pub exposed_seconds: f64,
}

impl Add for Spent {
    type Output = Spent;

    fn add(self, other: Spent) -> Spent {
        Spent {
            communication_seconds: self.communication_seconds + other.communication_seconds,
            exposed_seconds: self.exposed_seconds + other.exposed_seconds,
        }
    }
}

/// Sums the time of one communicator's works. Clones share one sum.
#[derive(Clone, Debug, Default)]
pub struct Meter(Arc<Mutex<Spent>>);

impl Meter {
    /// Runs `wait` and counts its duration as communication that no computation hid.
    pub fn exposed<T>(&self, wait: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = wait();
        let seconds = began.elapsed().as_secs_f64();
        self.add(Spent { communication_seconds: seconds, exposed_seconds: seconds });
        result
    }

    pub fn add(&self, more: Spent) {
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *sum = *sum + more;
    }

    /// Returns the sum since the last call.
    pub fn take(&self) -> Spent {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_add_to_one_sum_that_is_taken_once() {
        let meter = Meter::default();
        meter.clone().add(Spent { communication_seconds: 3.0, exposed_seconds: 1.0 });
        assert_eq!(meter.exposed(|| 7), 7);
        let spent = meter.take();
        assert!(spent.communication_seconds >= 3.0 && spent.exposed_seconds >= 1.0);
        assert!(spent.communication_seconds - spent.exposed_seconds > 1.9);
        assert_eq!(meter.take(), Spent::default());
    }
}
