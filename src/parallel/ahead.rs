//! Leaves of the stages in the order in which they are used, those of the next on their way while one computes.

use super::Bucket;
use super::bucket::{Gathering, Weights};
use crate::collective::Collective;
use crate::error::Result;

/// Gathers one stage ahead.
pub struct Ahead<'m, I> {
    buckets: &'m [Bucket],
    shards: &'m dyn Collective,
    order: I,
    next: Option<Gathering>,
}

impl<'m, I: Iterator<Item = usize>> Ahead<'m, I> {
    pub fn new(buckets: &'m [Bucket], shards: &'m dyn Collective, order: I) -> Self {
        Ahead { buckets, shards, order, next: None }
    }

    /// The leaves of the next stage in the order.
    ///
    /// # Ordering
    /// Every rank of a shard group asks for the same stages in the same order, to the end.
    /// # Panics
    /// If the order is at its end (a bug in the caller).
    pub fn next(&mut self) -> Result<Weights> {
        let current = match self.next.take() {
            Some(gathering) => gathering,
            None => self.begin()?.expect("the order names every stage that is used"),
        };
        self.next = self.begin()?;
        current.wait()
    }

    fn begin(&mut self) -> Result<Option<Gathering>> {
        self.order.next().map(|stage| self.buckets[stage].gather(self.shards)).transpose()
    }
}
