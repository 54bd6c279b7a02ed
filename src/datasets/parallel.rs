//! Work on many files at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::error::Result;
use crate::pulse;

/// Applies `work` to each item on `jobs` threads; returns the results in the order of the items.
///
/// # Errors
/// That of the first item that fails, on whichever thread; the items after it may be left out.
pub(super) fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    jobs: usize,
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            pulse::still_at_work();
            let outcome = work(item);
            if outcome.is_err() {
                // Items are handed out in order, so that all before this one are under way.
                next.store(items.len(), Ordering::Relaxed);
            }
            done.push((index, outcome));
        }
    };
    let mut done = thread::scope(|scope| {
        let others: Vec<_> = (1..jobs.min(items.len())).map(|_| scope.spawn(worker)).collect();
        let mut done = worker();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_keep_their_order_and_the_first_failure_is_told() {
        let items: Vec<usize> = (0..100).collect();
        let doubled = in_parallel(&items, 3, |item| Ok(2 * item)).expect("nothing fails");
        assert_eq!(doubled, items.iter().map(|item| 2 * item).collect::<Vec<_>>());
        let failing = |item: &usize| match item % 7 {
            6 => Err(Error::data("x", item.to_string())),
            _ => Ok(()),
        };
        for jobs in [1, 4] {
            let error = in_parallel(&items, jobs, failing).expect_err("the seventh fails");
            assert_eq!(error.to_string(), "x: 6");
        }
        assert!(in_parallel(&[] as &[usize], 4, failing).expect("nothing to do").is_empty());
    }
}
