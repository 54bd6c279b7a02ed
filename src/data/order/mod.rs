//! The order of samples: a pure function of seed and step, so that a resume needs only the step.
//!
//! Each epoch permutes each resolution group, cuts it into global batches, drops the remainder
//! (different samples in each epoch) and permutes the batches of all groups. Groups thus mix, and a
//! step has one shape on every rank. Where samples are taken several times an epoch, by repeats or
//! by the weights of datasets, their copies are spread over it.
//!
//! | question | file |
//! |---|---|
//! | how often each sample is taken | `stock.rs` |
//! | the order of one epoch | `epoch.rs` |

mod epoch;
mod stock;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::dataset::Dataset;
use super::group::Group;
use super::settings::OnSmallGroup;
use crate::error::Result;
use epoch::Epoch;
pub use epoch::permute;
pub use stock::Stock;
use stock::{Counts, GroupPlan};

/// Epochs that are kept: threads that read ahead are in the next one while others are in the last.
const KEPT_EPOCHS: usize = 2;

/// Selects the samples of each step. Clones share the epochs in memory.
#[derive(Clone, Debug)]
pub struct Order {
    plan: Arc<Plan>,
    /// The epochs used last: steps are requested nearly in order, and permuting costs a pass over
    /// all ids.
    epochs: Arc<Mutex<VecDeque<Arc<Epoch>>>>,
}

#[derive(Debug)]
struct Plan {
    counts: Counts,
    global_batch: usize,
    seed: u64,
    on_small_group: OnSmallGroup,
    batches_per_epoch: u64,
}

impl Order {
    /// Orders these groups in global batches of `global_batch` samples, each sample once an epoch.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if a group is smaller than the global batch,
    /// since its samples would never be used.
    /// # Panics
    /// If there are no groups or the global batch is 0 (bugs in the caller).
    pub fn new(groups: &[Group], global_batch: usize, seed: u64) -> Result<Self> {
        let once = |group: &Group| {
            let runs = group.sample_ids.chunk_by(|a, b| a + 1 == *b);
            let stock = runs.map(|run| Stock {
                ids: run[0]..run[0] + run.len() as u64,
                repeats: 1,
                folder: 0,
            });
            GroupPlan::new(&group.name, stock.collect())
        };
        let groups = groups.iter().map(once).collect();
        Order::over(groups, &[0.0], global_batch, seed, OnSmallGroup::Stop)
    }

    /// Orders the samples of a dataset, with the repeats and weights of its folders, in global
    /// batches of `global_batch` samples.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if a group is smaller than the global batch and
    /// `on_small_group` stops, or if no group is left;
    /// [`Error::Config`](crate::error::Error::Config) if repeats or weights make an epoch too long.
    /// # Panics
    /// If the global batch is 0 (a bug in the caller).
    pub fn of(
        dataset: &Dataset,
        global_batch: usize,
        seed: u64,
        on_small_group: OnSmallGroup,
    ) -> Result<Self> {
        let stock = dataset.groups().iter().zip(dataset.stock());
        let groups = stock.map(|(group, stock)| GroupPlan::new(&group.name, stock)).collect();
        let weights: Vec<f64> = dataset.folders().iter().map(|folder| folder.weight()).collect();
        Order::over(groups, &weights, global_batch, seed, on_small_group)
    }

    fn over(
        groups: Vec<GroupPlan>,
        weights: &[f64],
        global_batch: usize,
        seed: u64,
        on_small_group: OnSmallGroup,
    ) -> Result<Self> {
        assert!(
            !groups.is_empty() && global_batch > 0,
            "{} groups, global batch {global_batch}",
            groups.len()
        );
        let counts = Counts::new(groups, weights, global_batch as u64, on_small_group)?;
        let batches = counts.groups.iter().map(|group| group.taken() / global_batch as u64);
        let batches_per_epoch = batches.sum();
        let plan = Plan { counts, global_batch, seed, on_small_group, batches_per_epoch };
        Ok(Order { plan: Arc::new(plan), epochs: Arc::default() })
    }

    /// Returns the number of steps in one epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        self.plan.batches_per_epoch
    }

    /// Returns the number of samples that one epoch leaves out, because they do not fill a global
    /// batch of their group; groups that are left out as a whole are not among them.
    pub fn left_out_per_epoch(&self) -> u64 {
        self.samples_per_epoch() - self.batches_per_epoch() * self.plan.global_batch as u64
    }

    /// Returns the number of samples that one epoch orders, repeats included, before it leaves some
    /// out.
    pub fn samples_per_epoch(&self) -> u64 {
        self.plan.counts.groups.iter().map(GroupPlan::taken).sum()
    }

    /// Returns the number of samples of a folder that one epoch orders.
    pub fn samples_of(&self, folder: usize) -> u64 {
        self.plan.counts.taken_of(folder)
    }

    /// True if samples of a resolution group are taken; groups can be left out as a whole.
    pub fn takes(&self, group: usize) -> bool {
        self.plan.counts.groups[group].taken() > 0
    }

    /// Describes what becomes of groups that are smaller than a global batch, if there are any.
    pub fn small_groups(&self) -> Option<String> {
        const NAMED: usize = 4;
        let small = &self.plan.counts.small;
        let samples: u64 = small.iter().map(|(_, samples)| samples).sum();
        let mut named: Vec<String> =
            small.iter().take(NAMED).map(|(name, samples)| format!("{name} ({samples})")).collect();
        if small.len() > NAMED {
            named.push(format!("{} more", small.len() - NAMED));
        }
        let what = match self.plan.on_small_group {
            OnSmallGroup::Repeat => "repeats the samples of",
            _ => "leaves out",
        };
        (!small.is_empty()).then(|| {
            format!(
                "data.on_small_group {what} {} of {} resolution groups, of {samples} samples, which \
                 are smaller than the global batch of {}: {}",
                small.len(),
                self.plan.counts.groups.len(),
                self.plan.global_batch,
                named.join(", ")
            )
        })
    }

    /// Returns what becomes of groups that are smaller than a global batch; `None` if none is.
    pub fn on_small_group(&self) -> Option<OnSmallGroup> {
        (!self.plan.counts.small.is_empty()).then_some(self.plan.on_small_group)
    }

    /// Returns the epoch of a step; both count from 0.
    pub fn epoch_of(&self, step: u64) -> u64 {
        step / self.batches_per_epoch()
    }

    /// Returns the index of the resolution group that a step draws from.
    pub fn group(&self, step: u64) -> usize {
        self.of_batch(step, |group, _| group)
    }

    /// Returns the sample ids of one step over all ranks and micro-batches, all of one group.
    pub fn global_batch(&self, step: u64) -> Vec<u64> {
        self.of_batch(step, |_, ids| ids.to_vec())
    }

    /// Returns the sample ids of one block of the global batch: one micro-batch of one rank.
    ///
    /// # Panics
    /// If the block is outside the global batch (a bug in the caller).
    pub fn block(&self, step: u64, block: usize, size: usize) -> Vec<u64> {
        self.of_batch(step, |_, ids| ids[block * size..][..size].to_vec())
    }

    /// Returns for each sample of a block how often the global batch has it in front of that place.
    ///
    /// # Panics
    /// As [`block`](Self::block).
    pub fn copies(&self, step: u64, block: usize, size: usize) -> Vec<u64> {
        self.of_batch(step, |group, ids| {
            if self.plan.counts.groups[group].rounds() <= 1 {
                return vec![0; size];
            }
            let mut seen = BTreeMap::new();
            let mut before = ids[..(block + 1) * size].iter().map(|id| {
                let count = seen.entry(*id).or_insert(0u64);
                *count += 1;
                *count - 1
            });
            before.by_ref().skip(block * size).collect()
        })
    }

    /// Calls `body` with group and samples of a step.
    fn of_batch<T>(&self, step: u64, body: impl FnOnce(usize, &[u64]) -> T) -> T {
        let (epoch, number) = (self.epoch(self.epoch_of(step)), step % self.batches_per_epoch());
        let (group, ids) = epoch.batch(number as usize, self.plan.global_batch);
        body(group, ids)
    }

    fn epoch(&self, number: u64) -> Arc<Epoch> {
        // Held while an epoch is made, so that the threads that wait for it make it once. A panic
        // leaves the list unchanged.
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = epochs.iter().find(|epoch| epoch.number == number) {
            return Arc::clone(known);
        }
        let Plan { counts, global_batch, seed, .. } = &*self.plan;
        epochs.truncate(KEPT_EPOCHS - 1);
        let epoch = Arc::new(Epoch::new(&counts.groups, *global_batch, *seed, number));
        epochs.push_front(Arc::clone(&epoch));
        epoch
    }
}
