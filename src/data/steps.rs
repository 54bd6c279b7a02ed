//! The steps of a run as one rank takes them: the samples and the cut into micro-batches of each.

use std::sync::Arc;

use super::order::Order;
use super::share::Share;

/// Position of a micro-batch in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Optimizer step, counted from 1.
    pub step: u64,
    pub micro_batch: usize,
}

/// The samples and micro-batches of each step on one rank: a pure function of the step. Clones
/// share the order.
#[derive(Clone, Debug)]
pub struct Steps {
    order: Order,
    /// The rank's share of a step of each resolution group, or one share of every step.
    shares: Arc<[Share]>,
    /// Batches of the order that come before step 1. Other than 0 after a change of the global
    /// batch, and below 0 if fewer batches than steps have the samples that were seen.
    ahead: i64,
}

/// Returns the number of global batches that have so many samples, the last one perhaps in part.
pub fn batches_of(samples_seen: u64, global_batch: u64) -> u64 {
    samples_seen.div_ceil(global_batch)
}

impl Steps {
    /// Cuts every step alike.
    pub fn alike(order: Order, share: Share) -> Self {
        Steps { order, shares: Arc::new([share]), ahead: 0 }
    }

    /// Cuts the steps of each resolution group in their own way.
    ///
    /// # Panics
    /// If there are no shares (a bug in the caller).
    pub fn by_group(order: Order, shares: Vec<Share>) -> Self {
        assert!(!shares.is_empty(), "a dataset has resolution groups");
        let shares = if shares.iter().all(|share| *share == shares[0]) {
            Arc::new([shares[0]]) as Arc<[Share]>
        } else {
            shares.into()
        };
        Steps { order, shares, ahead: 0 }
    }

    /// The same cut, of a run that goes on in the order after `samples_seen`, whatever the global
    /// batches that they were seen in.
    pub fn going_on(self, steps_done: u64, samples_seen: u64) -> Self {
        let batches = batches_of(samples_seen, self.share(1).global_batch() as u64);
        Steps { ahead: batches as i64 - steps_done as i64, ..self }
    }

    pub fn order(&self) -> &Order {
        &self.order
    }

    /// Returns this rank's share of a step, which counts from 1.
    pub fn share(&self, step: u64) -> Share {
        match &*self.shares {
            [alike] => *alike,
            by_group => by_group[self.order.group(self.batch(step))],
        }
    }

    /// Returns the epoch of a step; epochs count from 0.
    pub fn epoch_of(&self, step: u64) -> u64 {
        self.order.epoch_of(self.batch(step))
    }

    /// Returns the number of epochs that are over after a step, if it is the last of one.
    pub fn epochs_ended_by(&self, step: u64) -> Option<u64> {
        let (batches, of_epoch) = (self.batch(step) + 1, self.order.batches_per_epoch());
        batches.is_multiple_of(of_epoch).then_some(batches / of_epoch)
    }

    /// Returns the different shares.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// Returns the sample ids of a micro-batch.
    pub fn sample_ids(&self, place: Place) -> Vec<u64> {
        self.of_block(place, Order::block)
    }

    /// Returns for each sample of a micro-batch how often the global batch has it in front of that
    /// place, over all ranks.
    pub fn copies(&self, place: Place) -> Vec<u64> {
        self.of_block(place, Order::copies)
    }

    /// Returns the micro-batches of all steps after `steps_done`, in the order of training.
    pub fn places_after(&self, steps_done: u64) -> impl Iterator<Item = Place> + Clone + use<> {
        let steps = self.clone();
        (steps_done + 1..).flat_map(move |step| {
            let micro_batches = steps.share(step).micro_batches;
            (0..micro_batches).map(move |micro_batch| Place { step, micro_batch })
        })
    }

    /// Returns the place of a step among the global batches of the order, which count from 0.
    fn batch(&self, step: u64) -> u64 {
        (step - 1).wrapping_add_signed(self.ahead)
    }

    fn of_block<T>(
        &self,
        Place { step, micro_batch }: Place,
        of: impl Fn(&Order, u64, usize, usize) -> T,
    ) -> T {
        let share = self.share(step);
        of(&self.order, self.batch(step), share.block(micro_batch), share.micro_batch_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Group;

    fn share(rank: usize, micro_batches: usize, micro_batch_size: usize) -> Share {
        Share { rank, world_size: 2, micro_batches, micro_batch_size, neighbours: false }
    }

    /// Two groups in global batches of 8; the small samples are cut into fewer micro-batches.
    fn steps(rank: usize) -> Steps {
        let group = |name: &str, ids: std::ops::Range<u64>| Group {
            name: name.into(),
            sample_ids: ids.collect(),
            ..Group::default()
        };
        let groups = [group("small", 0..40), group("large", 40..80)];
        let order = Order::new(&groups, 8, 5).expect("large enough groups");
        Steps::by_group(order, vec![share(rank, 1, 4), share(rank, 4, 1)])
    }

    #[test]
    fn each_step_is_cut_by_its_group_and_the_ranks_have_all_of_it() {
        let of_rank = |rank: usize| -> Vec<(Place, Vec<u64>)> {
            let steps = steps(rank);
            let places = steps.places_after(0).take_while(|place| place.step <= 10);
            places.map(|place| (place, steps.sample_ids(place))).collect()
        };
        let both: Vec<_> = of_rank(0).into_iter().chain(of_rank(1)).collect();
        for step in 1..=10 {
            let of_step = || both.iter().filter(|(place, _)| place.step == step);
            let mut ids: Vec<u64> = of_step().flat_map(|(_, ids)| ids.clone()).collect();
            let expected = if ids[0] < 40 { 2 } else { 8 };
            assert_eq!(of_step().count(), expected, "step {step}");
            let mut global = steps(0).order().global_batch(step - 1);
            ids.sort_unstable();
            global.sort_unstable();
            assert_eq!(ids, global, "step {step}");
        }
    }

    #[test]
    fn another_global_batch_goes_on_after_the_samples_that_were_seen() {
        let groups =
            [Group { name: "all".into(), sample_ids: (0..48).collect(), ..Group::default() }];
        let steps = |global_batch: usize| {
            let share = Share { world_size: 1, ..share(0, 1, global_batch) };
            Steps::alike(Order::new(&groups, global_batch, 5).expect("one group"), share)
        };
        // 9 steps of 8 are an epoch and a half.
        let (halved, doubled) = (steps(4).going_on(9, 72), steps(16).going_on(9, 72));
        let batch = |steps: &Steps, step| steps.sample_ids(Place { step, micro_batch: 0 });
        assert_eq!(batch(&halved, 10), steps(4).order().global_batch(18));
        assert_eq!(batch(&doubled, 10), steps(16).order().global_batch(5));
        assert_eq!([halved.epoch_of(10), doubled.epoch_of(10)], [1, 1]);
        let ends = |steps: &Steps| -> Vec<(u64, u64)> {
            (10..20).filter_map(|step| Some((step, steps.epochs_ended_by(step)?))).collect()
        };
        assert_eq!(ends(&halved), [(15, 2)]);
        assert_eq!(ends(&doubled), [(10, 2), (13, 3), (16, 4), (19, 5)]);
        let unchanged = steps(8).going_on(9, 72);
        assert_eq!(batch(&unchanged, 10), batch(&steps(8), 10));
    }

    #[test]
    fn places_go_on_after_any_step() {
        let steps = steps(1);
        let all: Vec<Place> = steps.places_after(0).take(60).collect();
        let later: Vec<Place> = steps.places_after(7).take(20).collect();
        let first = all.iter().position(|place| place.step == 8).expect("the eighth step");
        assert_eq!(all[first..][..20], later);
    }
}
