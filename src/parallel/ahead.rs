//! Gathers the stages' parameters in the order of their use: while one stage computes, the next
//! one's come from the other ranks or from host memory.

use crate::error::Result;
use crate::parallel::Replica;
use crate::parallel::bucket::{Gathering, Weights};

/// Gathers one stage ahead.
pub struct Ahead<'m, I> {
    replica: &'m Replica<'m>,
    order: I,
    /// The index of the next stage, and its parameters under way.
    next: Option<(usize, Gathering<'m>)>,
}

impl<'m, I: Iterator<Item = usize>> Ahead<'m, I> {
    pub fn new(replica: &'m Replica<'m>, order: I) -> Self {
        Ahead { replica, order, next: None }
    }

    /// Returns the parameters of the next stage in the order.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it for the same stages in the same order, to the end.
    /// # Panics
    /// If the order is at its end (a bug in the caller).
    pub fn next(&mut self) -> Result<Weights> {
        let (stage, current) = match self.next.take() {
            Some(started) => started,
            None => self.start_next()?.expect("the order names every stage that is used"),
        };
        self.next = self.start_next()?;
        current.wait(self.replica.stages[stage].params())
    }

    fn start_next(&mut self) -> Result<Option<(usize, Gathering<'m>)>> {
        let Replica { buckets, sharing, copies, .. } = self.replica;
        self.order
            .next()
            .map(|stage| Ok((stage, buckets[stage].gather(sharing.shards(), copies)?)))
            .transpose()
    }
}
