//! Sums gradients over micro-batches and ranks.

mod accumulator;

use std::collections::VecDeque;

pub use accumulator::Summation;

use accumulator::Accumulator;
use tch::Tensor;

use crate::collective::{ReduceOp, Sliced, Work};
use crate::error::Result;
use crate::parallel::{Bucket, Joining, Sharding, Sharing};

/// Buckets whose reduce-scatter may be under way at once: each holds a stage's whole gradient until
/// it is complete.
pub(crate) const BUCKETS_UNDER_WAY: usize = 1;

/// Collects the gradients of one optimizer step: sums micro-batches, and passes each stage's bucket
/// to a collective as soon as it is complete, so that the collective is under way while the
/// previous stage computes.
pub struct Reducer<'r> {
    sharing: &'r Sharing<'r>,
    buckets: &'r [Bucket],
    joining: Joining,
    /// By stage and trained piece: the sums on this rank, over gradients that are still to be
    /// reduced or have been.
    sums: Vec<Vec<Accumulator>>,
    under_way: VecDeque<UnderWay>,
}

/// A stage's bucket in a collective.
struct UnderWay {
    stage: usize,
    /// This rank's shard of each piece.
    owned: Vec<Tensor>,
    work: Work,
    /// True if the shards must still be summed over the replicas.
    to_replicas: bool,
}

impl<'r> Reducer<'r> {
    pub fn new(
        sharing: &'r Sharing<'r>,
        buckets: &'r [Bucket],
        joining: Joining,
        summation: Summation,
    ) -> Self {
        let accumulators =
            |bucket: &Bucket| bucket.trained().map(|_| Accumulator::new(summation)).collect();
        Reducer {
            sharing,
            buckets,
            joining,
            sums: buckets.iter().map(accumulators).collect(),
            under_way: VecDeque::new(),
        }
    }

    /// Adds a stage's gradient of one micro-batch, a flat tensor for each of its trained pieces.
    ///
    /// # Ordering
    /// Every rank adds the same stages in the same order, with `last` on the same micro-batch.
    pub fn add(&mut self, stage: usize, gradients: Vec<Tensor>, last: bool) -> Result<()> {
        while self.under_way.len() >= BUCKETS_UNDER_WAY && self.sharing.sharding != Sharding::None {
            self.finish_oldest()?;
        }
        if self.sharing.sharding.scatters_each_micro_batch() {
            return self.start(stage, gradients);
        }
        self.accumulate(stage, gradients);
        if last {
            let sums = self.take_sums(stage);
            self.start(stage, sums)?;
        }
        Ok(())
    }

    /// Waits for the collectives. Returns this rank's shard of the summed gradient, by stage and
    /// trained piece, in the kind of [`Joining::kept`]; empty for a stage that is not trained.
    pub fn finish(mut self) -> Result<Vec<Vec<Tensor>>> {
        while !self.under_way.is_empty() {
            self.finish_oldest()?;
        }
        Ok((0..self.sums.len()).map(|stage| self.take_sums(stage)).collect())
    }

    fn accumulate(&mut self, stage: usize, gradients: Vec<Tensor>) {
        self.sums[stage].iter_mut().zip(gradients).for_each(|(sum, gradient)| sum.add(gradient));
    }

    fn take_sums(&mut self, stage: usize) -> Vec<Tensor> {
        self.sums[stage].iter_mut().filter_map(Accumulator::take).collect()
    }

    /// Starts the collective of a complete bucket: a reduce-scatter to the owners of its shards,
    /// or, if each rank holds all of it, an all-reduce among the replicas.
    fn start(&mut self, stage: usize, gradients: Vec<Tensor>) -> Result<()> {
        let pieces = || self.buckets[stage].trained();
        let gradients: Vec<Tensor> = pieces()
            .zip(gradients)
            .map(|(piece, gradient)| gradient.to_kind(self.joining.sent(piece.kind())))
            .collect();
        let (mut owned, mut whole, mut cut) = (Vec::new(), Vec::new(), Vec::new());
        for (piece, full) in pieces().zip(gradients) {
            if piece.layout().is_whole() {
                whole.push(full.shallow_clone());
                owned.push(full);
            } else {
                let range = piece.layout().owned();
                let shard = Tensor::empty([range.end - range.start], (full.kind(), full.device()));
                cut.push(Sliced { owned: shard.shallow_clone(), full });
                owned.push(shard);
            }
        }
        let scattered = !cut.is_empty();
        let work = match scattered {
            true => self.sharing.shards().reduce_scatter(cut, ReduceOp::Sum)?,
            false => self.sharing.replicas().all_reduce(whole, ReduceOp::Sum)?,
        };
        self.under_way.push_back(UnderWay { stage, owned, work, to_replicas: scattered });
        Ok(())
    }

    /// Waits for the oldest bucket under way and adds its result to the sums.
    fn finish_oldest(&mut self) -> Result<()> {
        let Some(UnderWay { stage, owned, work, to_replicas }) = self.under_way.pop_front() else {
            return Ok(());
        };
        work.wait()?;
        if to_replicas {
            let shards = owned.iter().map(Tensor::shallow_clone).collect();
            self.sharing.replicas().all_reduce(shards, ReduceOp::Sum)?.wait()?;
        }
        self.accumulate(stage, owned);
        Ok(())
    }
}

impl Sharding {
    /// True if a bucket is scattered to its owners after each micro-batch, so that no rank holds
    /// the whole gradient.
    pub fn scatters_each_micro_batch(self) -> bool {
        matches!(self, Sharding::Gradients | Sharding::Parameters)
    }
}
