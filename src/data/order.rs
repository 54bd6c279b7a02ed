//! The order of samples: a pure function of seed and step, so that a resume needs only the step.
//!
//! Each epoch permutes each resolution group, cuts it into global batches, drops the remainder
//! (different samples in each epoch) and permutes the batches of all groups. Groups thus mix, and a
//! step has one shape on every rank.

use std::cell::RefCell;

use super::group::Group;
use crate::error::{Error, Result};
use crate::rng::{Key, Purpose};

/// Selects the samples of each step.
#[derive(Clone, Debug)]
pub struct Order {
    /// Sample ids by group.
    groups: Vec<Vec<u64>>,
    global_batch: usize,
    seed: u64,
    /// The epoch used last: steps are requested nearly in order, and permuting costs a pass over
    /// all ids.
    epoch: RefCell<Epoch>,
}

#[derive(Clone, Debug)]
struct Epoch {
    number: u64,
    /// As `Order::groups`, permuted.
    groups: Vec<Vec<u64>>,
    /// Group of each step's batch, and the batch's index in it.
    batches: Vec<(usize, usize)>,
}

impl Order {
    /// Orders these groups in global batches of `global_batch` samples.
    ///
    /// # Errors
    /// [`Error::Data`] if a group is smaller than the global batch, since its samples would never
    /// be used.
    /// # Panics
    /// If there are no groups or the global batch is 0 (bugs in the caller).
    pub fn new(groups: &[Group], global_batch: usize, seed: u64) -> Result<Self> {
        assert!(
            !groups.is_empty() && global_batch > 0,
            "{} groups, global batch {global_batch}",
            groups.len()
        );
        for Group { name, sample_ids, .. } in groups {
            if sample_ids.len() < global_batch {
                let what = format!(
                    "has {} samples, fewer than the global batch of {global_batch}, so that none would be trained on; \
                     lower the global batch or merge the group",
                    sample_ids.len()
                );
                return Err(Error::data(format!("resolution group {name}"), what));
            }
        }
        let groups: Vec<Vec<u64>> = groups.iter().map(|group| group.sample_ids.clone()).collect();
        let epoch = RefCell::new(Epoch::new(&groups, global_batch, seed, 0));
        Ok(Order { groups, global_batch, seed, epoch })
    }

    /// Returns the number of steps in one epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        self.groups.iter().map(|ids| (ids.len() / self.global_batch) as u64).sum()
    }

    /// Returns the number of samples that one epoch leaves out, because they do not fill a global
    /// batch of their group.
    pub fn left_out_per_epoch(&self) -> u64 {
        self.groups.iter().map(|ids| (ids.len() % self.global_batch) as u64).sum()
    }

    /// Returns the epoch of a step; both count from 0.
    pub fn epoch_of(&self, step: u64) -> u64 {
        step / self.batches_per_epoch()
    }

    /// Returns the sample ids of one step over all ranks and micro-batches, all of one group.
    pub fn global_batch(&self, step: u64) -> Vec<u64> {
        let number = self.epoch_of(step);
        let mut epoch = self.epoch.borrow_mut();
        if epoch.number != number {
            *epoch = Epoch::new(&self.groups, self.global_batch, self.seed, number);
        }
        let (group, place) = epoch.batches[(step % self.batches_per_epoch()) as usize];
        epoch.groups[group][place * self.global_batch..][..self.global_batch].to_vec()
    }

    /// Returns the sample ids of one block of the global batch: one micro-batch of one rank.
    ///
    /// # Panics
    /// If the block is outside the global batch (a bug in the caller).
    pub fn block(&self, step: u64, block: usize, size: usize) -> Vec<u64> {
        self.global_batch(step)[block * size..][..size].to_vec()
    }
}

impl Epoch {
    fn new(groups: &[Vec<u64>], global_batch: usize, seed: u64, number: u64) -> Self {
        let key = Key::new(seed, Purpose::Order).step(number);
        let mut groups = groups.to_vec();
        let mut batches = Vec::new();
        for (group, ids) in groups.iter_mut().enumerate() {
            // Scope 0 is for the order of the batches.
            permute(ids, key.scope(group as u64 + 1));
            batches.extend((0..ids.len() / global_batch).map(|place| (group, place)));
        }
        permute(&mut batches, key);
        Epoch { number, groups, batches }
    }
}

/// Permutes with equal probability of every order. Source: Fisher and Yates 1938, in Durstenfeld's
/// form (1964).
pub fn permute<T>(items: &mut [T], key: Key) {
    for last in (1..items.len()).rev() {
        items.swap(last, key.below(last as u64, last as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn group(name: &str, ids: std::ops::Range<u64>) -> Group {
        Group { name: name.into(), sample_ids: ids.collect(), ..Group::default() }
    }

    /// 2 + 6 batches of 8, with 4 + 2 samples left out in each epoch.
    fn order() -> Order {
        Order::new(&[group("wide", 0..20), group("square", 20..70)], 8, 5)
            .expect("large enough groups")
    }

    #[test]
    fn a_step_is_the_same_reached_directly_or_by_walking() {
        let walking = order();
        let walked: Vec<Vec<u64>> = (0..30).map(|step| walking.global_batch(step)).collect();
        for step in [29, 0, 8, 7, 15, 16] {
            assert_eq!(order().global_batch(step), walked[step as usize], "step {step}");
            assert_eq!(
                walking.global_batch(step),
                walked[step as usize],
                "step {step}, going back"
            );
        }
    }

    #[test]
    fn an_epoch_reaches_every_sample_at_most_once_and_others_are_left_out_each_time() {
        let order = order();
        assert_eq!((order.batches_per_epoch(), order.left_out_per_epoch()), (8, 6));
        assert_eq!((order.epoch_of(7), order.epoch_of(8)), (0, 1));
        let reached = |epoch: u64| {
            let ids: Vec<u64> =
                (epoch * 8..epoch * 8 + 8).flat_map(|step| order.global_batch(step)).collect();
            let distinct: BTreeSet<u64> = ids.iter().copied().collect();
            assert_eq!((ids.len(), distinct.len()), (64, 64), "epoch {epoch}");
            distinct
        };
        assert_ne!(reached(0), reached(1));
        let over_ten: BTreeSet<u64> = (0..10).flat_map(reached).collect();
        assert_eq!(over_ten.len(), 70, "no sample is left out for ever");
    }

    #[test]
    fn b9_a_step_draws_from_one_group_and_the_groups_mix() {
        let order = order();
        let wide: Vec<bool> = (0..80)
            .map(|step| {
                let ids = order.global_batch(step);
                assert!(ids.iter().all(|id| *id < 20) || ids.iter().all(|id| *id >= 20), "{ids:?}");
                ids[0] < 20
            })
            .collect();
        assert_eq!(
            wide.iter().filter(|wide| **wide).count(),
            20,
            "two batches an epoch are of the small group"
        );
        let firsts: BTreeSet<bool> = wide.chunks(8).map(|epoch| epoch[0]).collect();
        assert_eq!(firsts.len(), 2, "epochs do not always begin with the same group");
    }

    #[test]
    fn b8_blocks_leave_nothing_of_the_global_batch_out() {
        let order = order();
        let blocks: Vec<Vec<u64>> = (0..4).map(|block| order.block(3, block, 2)).collect();
        assert_eq!(blocks.concat(), order.global_batch(3));
    }

    #[test]
    fn another_seed_is_another_order() {
        let other = Order::new(&[group("wide", 0..20), group("square", 20..70)], 8, 6)
            .expect("large enough groups");
        assert_ne!(order().global_batch(0), other.global_batch(0));
    }

    #[test]
    fn a_permutation_prefers_no_place() {
        let mut counts = [0; 5];
        for epoch in 0..5000 {
            let mut items = [0, 1, 2, 3, 4];
            permute(&mut items, Key::new(1, Purpose::Test).step(epoch));
            counts[items.iter().position(|item| *item == 0).expect("it is somewhere")] += 1;
        }
        // Binomial(5000, 0.2): 5 standard deviations are 141.
        assert!(counts.iter().all(|&count| (859..1141).contains(&count)), "{counts:?}");
    }

    #[test]
    fn a_group_smaller_than_the_global_batch_is_named() {
        let error = Order::new(&[group("wide", 0..20), group("8x8", 20..25)], 8, 5)
            .expect_err("five samples");
        assert_eq!(error.exit_code(), 40);
        assert!(
            error.to_string().starts_with(
                "resolution group 8x8: has 5 samples, fewer than the global batch of 8"
            ),
            "{error}"
        );
    }
}
