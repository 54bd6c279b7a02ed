//! How often an epoch takes the samples: their repeats, the weights of datasets, and groups that
//! are smaller than a global batch.

use std::ops::Range;

use crate::data::settings::OnSmallGroup;
use crate::error::{Error, Result};

/// Most samples of an epoch that takes samples more than once: its order is a list in memory.
const MOST_TAKEN: u64 = 1 << 28;

/// Samples with consecutive ids that an epoch takes equally often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stock {
    pub ids: Range<u64>,
    /// Times that an epoch takes each of them; with weights, at least.
    pub repeats: u64,
    /// Index of their folder in the dataset.
    pub folder: usize,
}

impl Stock {
    fn slots(&self) -> u64 {
        (self.ids.end - self.ids.start).saturating_mul(self.repeats)
    }
}

/// The samples of one folder in one resolution group.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    folder: usize,
    pub stock: Vec<Stock>,
    /// Number of its samples, each counted with its repeats.
    pub slots: u64,
    /// Number of samples that an epoch takes of it, at least its slots.
    pub taken: u64,
}

/// A resolution group in the plan of an epoch.
#[derive(Clone, Debug)]
pub(super) struct GroupPlan {
    name: String,
    /// Empty if the group is left out.
    pub cells: Vec<Cell>,
}

/// Number of samples that an epoch takes of each folder in each group; the same in every epoch.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    pub groups: Vec<GroupPlan>,
    /// Groups that are smaller than a global batch, with their samples and repeats.
    pub small: Vec<(String, u64)>,
}

impl GroupPlan {
    pub fn new(name: &str, stock: Vec<Stock>) -> Self {
        let mut cells: Vec<Cell> = Vec::new();
        for stock in stock {
            let slots = stock.slots();
            match cells.iter_mut().find(|cell| cell.folder == stock.folder) {
                Some(cell) => {
                    cell.slots = cell.slots.saturating_add(slots);
                    cell.stock.push(stock);
                }
                None => {
                    cells.push(Cell { folder: stock.folder, stock: vec![stock], slots, taken: 0 })
                }
            }
        }
        cells.iter_mut().for_each(|cell| cell.taken = cell.slots);
        GroupPlan { name: name.into(), cells }
    }

    /// Returns the number of samples that an epoch takes of the group.
    pub fn taken(&self) -> u64 {
        self.cells.iter().fold(0, |sum, cell| sum.saturating_add(cell.taken))
    }

    /// Returns the most times that an epoch takes one sample of the group.
    pub fn rounds(&self) -> u64 {
        let most = |cell: &Cell| {
            let repeats = cell.stock.iter().map(|stock| stock.repeats).max().unwrap_or(0);
            repeats.saturating_mul(cell.taken.div_ceil(cell.slots.max(1)))
        };
        self.cells.iter().map(most).max().unwrap_or(0)
    }
}

impl Counts {
    /// Counts the samples of an epoch. `weights`: the folders' shares of it relative to one
    /// another, or all 0.
    ///
    /// # Errors
    /// [`Error::Data`] for a group that is smaller than a global batch, if that stops the run, and
    /// if no group is left; [`Error::Config`] for an epoch that is too long.
    pub fn new(
        mut groups: Vec<GroupPlan>,
        weights: &[f64],
        global_batch: u64,
        on_small: OnSmallGroup,
    ) -> Result<Self> {
        check_length(&groups)?;
        let is_small = |group: &GroupPlan| group.taken() < global_batch;
        let small: Vec<(String, u64)> = groups
            .iter()
            .filter(|group| is_small(group))
            .map(|group| (group.name.clone(), group.taken()))
            .collect();
        if on_small == OnSmallGroup::Stop
            && let Some((name, samples)) = small.first()
        {
            return Err(stopped(name, *samples, small.len(), global_batch));
        }
        for group in groups.iter_mut().filter(|group| is_small(group)) {
            match on_small {
                OnSmallGroup::Repeat => {
                    let slots: Vec<u64> = group.cells.iter().map(|cell| cell.slots).collect();
                    let counts = apportioned(global_batch, &slots);
                    group.cells.iter_mut().zip(counts).for_each(|(cell, count)| cell.taken = count);
                }
                _ => group.cells.clear(),
            }
        }
        if groups.iter().all(|group| group.cells.is_empty()) {
            let what = format!(
                "every one is smaller than the global batch of {global_batch}, so that none would \
                 be trained on; lower the global batch, or set data.on_small_group = \"repeat\""
            );
            return Err(Error::data("resolution groups", what));
        }
        if weights.iter().any(|weight| *weight > 0.0) {
            weigh(&mut groups, weights);
        }
        check_length(&groups)?;
        Ok(Counts { groups, small })
    }

    /// Returns the number of samples that an epoch takes of a folder.
    pub fn taken_of(&self, folder: usize) -> u64 {
        let cells = self.groups.iter().flat_map(|group| &group.cells);
        cells.filter(|cell| cell.folder == folder).map(|cell| cell.taken).sum()
    }
}

/// Refuses an epoch whose order would not fit into memory, though each sample once would.
fn check_length(groups: &[GroupPlan]) -> Result<()> {
    let taken = groups.iter().fold(0u64, |sum, group| sum.saturating_add(group.taken()));
    let stock = groups.iter().flat_map(|group| &group.cells).flat_map(|cell| &cell.stock);
    let once: u64 = stock.map(|stock| stock.ids.end - stock.ids.start).sum();
    if taken <= once.max(MOST_TAKEN) {
        return Ok(());
    }
    let what = format!(
        "repeats and weights make an epoch of {taken} samples, more than {MOST_TAKEN}; lower the \
         repeats, or bring the weights closer to the datasets' sizes"
    );
    Err(Error::config("data.datasets", what))
}

fn stopped(name: &str, samples: u64, groups: usize, global_batch: u64) -> Error {
    let others = match groups - 1 {
        0 => String::new(),
        1 => "; another group is too small as well".into(),
        more => format!("; {more} other groups are too small as well"),
    };
    let what = format!(
        "has {samples} samples, fewer than the global batch of {global_batch}, so that none would be \
         trained on{others}; lower the global batch or merge the group, or set data.on_small_group \
         = \"drop\" to leave such groups out or \"repeat\" to fill them"
    );
    Error::data(format!("resolution group {name}"), what)
}

/// Raises the counts to the smallest ones at which the folders' shares are those of their weights.
fn weigh(groups: &mut [GroupPlan], weights: &[f64]) {
    let of_folder = |groups: &[GroupPlan], folder: usize| -> Vec<u64> {
        let cells = groups.iter().flat_map(|group| &group.cells);
        cells.filter(|cell| cell.folder == folder).map(|cell| cell.taken).collect()
    };
    let sizes: Vec<u64> =
        (0..weights.len()).map(|folder| of_folder(groups, folder).iter().sum()).collect();
    for (folder, total) in weighted(&sizes, weights).into_iter().enumerate() {
        let mut counts = apportioned(total, &of_folder(groups, folder)).into_iter();
        let cells = groups.iter_mut().flat_map(|group| &mut group.cells);
        cells
            .filter(|cell| cell.folder == folder)
            .zip(counts.by_ref())
            .for_each(|(cell, count)| cell.taken = count);
    }
}

/// Returns the smallest numbers, none below its size, whose shares are those of the weights to one
/// sample. What has no samples gets none.
fn weighted(sizes: &[u64], weights: &[f64]) -> Vec<u64> {
    let pairs = || sizes.iter().zip(weights).filter(|(size, _)| **size > 0);
    let all: f64 = pairs().map(|(_, weight)| weight).sum();
    let longest = pairs().map(|(size, weight)| *size as f64 / weight).fold(0.0, f64::max);
    // Rounding of the floats must not make it one more.
    let total = (longest * all * (1.0 - 1e-13)).ceil();
    // Counts of up to 2^28 are told apart by far more than this.
    let quota = |weight: f64| total * weight / all * (1.0 + 1e-13);
    let mut counts: Vec<u64> = sizes
        .iter()
        .zip(weights)
        .map(|(size, weight)| if *size == 0 { 0 } else { (quota(*weight) as u64).max(*size) })
        .collect();
    let mut rest =
        (total as u64).saturating_sub(counts.iter().fold(0, |a, b| a.saturating_add(*b)));
    let mut by_remainder: Vec<usize> = (0..sizes.len()).filter(|place| sizes[*place] > 0).collect();
    by_remainder.sort_by(|a, b| quota(weights[*b]).fract().total_cmp(&quota(weights[*a]).fract()));
    for place in by_remainder {
        let one = rest.min(1);
        counts[place] = counts[place].saturating_add(one);
        rest -= one;
    }
    counts
}

/// Divides `total` in proportion to `parts`, by the largest remainders. If it is at least their
/// sum, no part shrinks.
fn apportioned(total: u64, parts: &[u64]) -> Vec<u64> {
    let sum: u128 = parts.iter().map(|part| u128::from(*part)).sum();
    let product = |part: u64| u128::from(total) * u128::from(part);
    let mut counts: Vec<u64> =
        parts.iter().map(|part| (product(*part) / sum.max(1)) as u64).collect();
    let mut by_remainder: Vec<usize> = (0..parts.len()).collect();
    by_remainder.sort_by_key(|place| std::cmp::Reverse(product(parts[*place]) % sum.max(1)));
    let rest = if sum == 0 { 0 } else { total - counts.iter().sum::<u64>() };
    by_remainder.into_iter().take(rest as usize).for_each(|place| counts[place] += 1);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    #[test]
    fn shares_are_those_of_the_weights_to_one_sample_and_nobody_is_taken_less_often() {
        assert_eq!(weighted(&[100, 20], &[1.0, 1.0]), [100, 100]);
        assert_eq!(weighted(&[100, 20], &[4.0, 1.0]), [100, 25]);
        assert_eq!(weighted(&[10, 0, 7], &[1.0, 5.0, 2.0]), [10, 0, 20]);
        let key = Key::new(3, Purpose::Test);
        for round in 0..500 {
            let draw = |index: u64, bound: u64| key.step(round).below(index, bound);
            let datasets = 1 + draw(0, 6) as usize;
            let sizes: Vec<u64> = (0..datasets).map(|i| 1 + draw(10 + i as u64, 100_000)).collect();
            let weights: Vec<f64> =
                (0..datasets).map(|i| (1 + draw(20 + i as u64, 1000)) as f64 * 0.01).collect();
            let counts = weighted(&sizes, &weights);
            let (total, all) = (counts.iter().sum::<u64>() as f64, weights.iter().sum::<f64>());
            for ((count, size), weight) in counts.iter().zip(&sizes).zip(&weights) {
                let exact = total * weight / all;
                assert!(
                    (*count as f64 - exact).abs() < 1.0 + 1e-6,
                    "{sizes:?} {weights:?} {counts:?}"
                );
                assert!(count >= size, "{sizes:?} {weights:?} {counts:?}");
            }
        }
    }

    #[test]
    fn a_number_is_divided_in_proportion_and_no_part_shrinks() {
        assert_eq!(apportioned(12, &[5, 0, 3]), [8, 0, 4]);
        assert_eq!(apportioned(8, &[5, 3]), [5, 3]);
        assert_eq!(apportioned(0, &[0, 0]), [0, 0]);
        let huge = apportioned(u64::MAX, &[1, 2]);
        assert_eq!(huge.iter().sum::<u64>(), u64::MAX);
    }
}
