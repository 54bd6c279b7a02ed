//! The order of one epoch: the copies of a sample are spread over it, and so are the batches of
//! each group that has copies.

use super::stock::{Cell, GroupPlan};
use crate::rng::{Key, Purpose};

/// Numbers by which places are moved: a start is a fraction of this.
const WHOLE: u64 = 1 << 32;

/// One epoch in its order.
#[derive(Debug)]
pub(super) struct Epoch {
    pub number: u64,
    /// Sample ids of each group, in the order of its batches.
    groups: Vec<Vec<u64>>,
    /// Group of each step's batch, and the batch's index in it.
    pub batches: Vec<(usize, usize)>,
}

impl Epoch {
    /// Orders an epoch of these groups in batches of `size` samples.
    pub fn new(plans: &[GroupPlan], size: usize, seed: u64, number: u64) -> Self {
        let key = Key::new(seed, Purpose::Order).step(number);
        // Scope 0 is for the order of the batches.
        let of_group = |group: usize| key.scope(group as u64 + 1);
        let order = |(index, plan): (usize, &GroupPlan)| plan.ordered(of_group(index), number);
        let groups: Vec<Vec<u64>> = plans.iter().enumerate().map(order).collect();
        let num_batches: usize = groups.iter().map(|ids| ids.len() / size).sum();
        let rounds = plans.iter().map(GroupPlan::rounds).max().unwrap_or(1);
        // Batches keep the order of the rounds: each part of an epoch takes its part of every
        // group. Without copies there is one part.
        let parts = rounds.clamp(1, num_batches as u64);
        let mut by_part = vec![Vec::new(); parts as usize];
        for (group, ids) in groups.iter().enumerate() {
            let (count, start) =
                (ids.len() / size, of_group(group).micro_batch(u64::MAX).below(0, WHOLE));
            for place in 0..count {
                by_part[place_of(place as u64, start, count as u64, parts)].push((group, place));
            }
        }
        for (part, batches) in by_part.iter_mut().enumerate() {
            permute(batches, key.micro_batch(part as u64));
        }
        Epoch { number, groups, batches: by_part.concat() }
    }

    /// Returns all ids, also those that no batch has.
    #[cfg(test)]
    pub fn ids(&self) -> impl Iterator<Item = u64> {
        self.groups.iter().flatten().copied()
    }

    /// Returns group and sample ids of a batch of `size`.
    pub fn batch(&self, number: usize, size: usize) -> (usize, &[u64]) {
        let (group, place) = self.batches[number];
        (group, &self.groups[group][place * size..][..size])
    }
}

impl GroupPlan {
    /// Returns the ids that epoch `number` takes, in its order.
    fn ordered(&self, key: Key, number: u64) -> Vec<u64> {
        let rounds = self.rounds();
        if rounds <= 1 {
            let stock = self.cells.iter().flat_map(|cell| &cell.stock);
            let mut ids: Vec<u64> = stock.flat_map(|stock| stock.ids.clone()).collect();
            permute(&mut ids, key);
            return ids;
        }
        let once_more: Vec<Vec<bool>> = self
            .cells
            .iter()
            .zip(0..)
            .map(|(cell, place)| cell.once_more(key, place, number))
            .collect();
        // Counted first, so that one list holds all rounds one after another.
        let mut ends = vec![0usize; rounds as usize + 1];
        self.for_each_copy(key, &once_more, rounds, |round, _| ends[round + 1] += 1);
        for round in 1..ends.len() {
            ends[round] += ends[round - 1];
        }
        let (mut next, mut ids) = (ends.clone(), vec![0; ends[rounds as usize]]);
        self.for_each_copy(key, &once_more, rounds, |round, id| {
            ids[next[round]] = id;
            next[round] += 1;
        });
        for (round, ends) in ends.windows(2).enumerate() {
            permute(&mut ids[ends[0]..ends[1]], key.micro_batch(round as u64));
        }
        ids
    }

    /// Calls `each(round, id)` for every copy of every sample: the copies of a sample are in
    /// different rounds, as far apart as they can be.
    fn for_each_copy(
        &self,
        key: Key,
        once_more: &[Vec<bool>],
        rounds: u64,
        mut each: impl FnMut(usize, u64),
    ) {
        let start_of = key.micro_batch(u64::MAX);
        for (cell, once_more) in self.cells.iter().zip(once_more) {
            let (whole, mut slots) = (cell.taken / cell.slots, once_more.iter());
            for stock in &cell.stock {
                for id in stock.ids.clone() {
                    let more = slots.by_ref().take(stock.repeats as usize).filter(|more| **more);
                    let copies = whole * stock.repeats + more.count() as u64;
                    let start = start_of.below(id, WHOLE);
                    (0..copies).for_each(|copy| each(place_of(copy, start, copies, rounds), id));
                }
            }
        }
    }
}

impl Cell {
    /// Marks the slots that epoch `number` takes once more than the others. Epochs go round all
    /// slots in one random order, so that none is passed over for ever.
    fn once_more(&self, key: Key, place: u64, number: u64) -> Vec<bool> {
        let more = self.taken % self.slots;
        if more == 0 {
            return Vec::new();
        }
        let order =
            Key::new(key.seed, Purpose::Order).step(u64::MAX).scope(key.scope).micro_batch(place);
        let order = order.permutation(self.slots);
        let first = u128::from(number) * u128::from(more) % u128::from(self.slots);
        let mut marked = vec![false; self.slots as usize];
        for slot in order.iter().cycle().skip(first as usize).take(more as usize) {
            marked[*slot as usize] = true;
        }
        marked
    }
}

/// Returns the part, of `parts` equal ones, in which item `index` of `count` evenly spaced ones
/// lies. They are moved by `start / WHOLE` of their distance. Where there are no more items than
/// parts, no two lie in one.
fn place_of(index: u64, start: u64, count: u64, parts: u64) -> usize {
    let (whole, at) =
        (u128::from(WHOLE), u128::from(index) * u128::from(WHOLE) + u128::from(start));
    (at * u128::from(parts) / (u128::from(count) * whole)) as usize
}

/// Permutes with equal probability of every order. Source: Fisher and Yates 1938, in Durstenfeld's
/// form (1964).
pub fn permute<T>(items: &mut [T], key: Key) {
    for last in (1..items.len()).rev() {
        items.swap(last, key.below(last as u64, last as u64 + 1) as usize);
    }
}
