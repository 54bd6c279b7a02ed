//! Parameters of the stages in the order in which they are used, those of the next on their way
//! while one computes.

use crate::error::Result;
use crate::parallel::Replica;
use crate::parallel::bucket::{Gathering, Weights};

/// Gathers one stage ahead.
pub struct Ahead<'m, I> {
    replica: &'m Replica<'m>,
    order: I,
    /// With the stage's number.
    next: Option<(usize, Gathering)>,
}

impl<'m, I: Iterator<Item = usize>> Ahead<'m, I> {
    pub fn new(replica: &'m Replica<'m>, order: I) -> Self {
        Ahead { replica, order, next: None }
    }

    /// The parameters of the next stage in the order.
    ///
    /// # Ordering
    /// Every rank of a shard group asks for the same stages in the same order, to the end.
    /// # Panics
    /// If the order is at its end (a bug in the caller).
    pub fn next(&mut self) -> Result<Weights> {
        let (stage, current) = match self.next.take() {
            Some(begun) => begun,
            None => self.begin()?.expect("the order names every stage that is used"),
        };
        self.next = self.begin()?;
        current.wait(self.replica.stages[stage].params())
    }

    fn begin(&mut self) -> Result<Option<(usize, Gathering)>> {
        let Replica { buckets, sharing, .. } = self.replica;
        self.order
            .next()
            .map(|stage| Ok((stage, buckets[stage].gather(sharing.shards())?)))
            .transpose()
    }
}
