//! The tokens of a condition that attention sees, and the mask that remains where the samples of a
//! micro-batch see different ones.
//!
//! Every adapter with a token mask decides here, from the loader's batch on the host and before the
//! inputs move to the device, so that no step waits for a device. Tokens that no sample sees are
//! cut. If then every sample sees every token, there is no mask, and attention may take a kernel
//! that knows none, such as flash attention. A masked key has the weight 0 exactly, so that cutting
//! it changes no number but by the order of sums.
//!
//! Each rank decides for its own micro-batch: no collective has the shape of an activation.

use std::ops::Range;

use tch::Tensor;

/// The tokens of one condition that at least one sample of a micro-batch sees.
#[derive(Debug)]
pub(super) struct SeenTokens {
    /// `[B, kept, …]`.
    pub tokens: Tensor,
    /// `[B, kept]` boolean, on the tokens' device: true where a sample sees a token. `None` if
    /// every sample sees them all.
    pub mask: Option<Tensor>,
    /// Indexes of the kept tokens among all, `[kept]` int64 on the host; `None` if they are the
    /// first ones.
    pub places: Option<Tensor>,
}

impl SeenTokens {
    /// Keeps all tokens, which every sample sees.
    pub fn all(tokens: Tensor) -> Self {
        SeenTokens { tokens, mask: None, places: None }
    }

    /// Keeps the tokens that a sample sees; if there is none and a stream of no tokens is not
    /// possible, `at_least_one`, the first token, masked.
    ///
    /// # Shapes
    /// `tokens`: `[B, L, …]` on any device; `mask`: `[B, L]` boolean on the host.
    pub fn by_mask(tokens: &Tensor, mask: &Tensor, at_least_one: bool) -> Self {
        let mut is_seen = Vec::<bool>::try_from(mask.any_dim(0, false)).expect("[L] booleans");
        if at_least_one && !is_seen.contains(&true) {
            is_seen.iter_mut().take(1).for_each(|is_seen| *is_seen = true);
        }
        let runs = runs(&is_seen);
        let kept = parts(mask, &runs);
        let sees_all = kept.all().int64_value(&[]) == 1;
        SeenTokens {
            tokens: parts(tokens, &runs),
            mask: (!sees_all).then(|| kept.to_device(tokens.device())),
            places: places(&runs),
        }
    }
}

/// Returns the runs of true ones.
fn runs(is_seen: &[bool]) -> Vec<Range<i64>> {
    let mut first = 0;
    let chunks = is_seen.chunk_by(|a, b| a == b).filter_map(|chunk| {
        let run = first..first + chunk.len() as i64;
        first = run.end;
        chunk[0].then_some(run)
    });
    chunks.collect()
}

/// Returns the indexes in these runs, if they do not count from 0.
fn places(runs: &[Range<i64>]) -> Option<Tensor> {
    let count_from_zero = runs.len() <= 1 && runs.iter().all(|run| run.start == 0);
    let indexes = || runs.iter().cloned().flatten().collect::<Vec<i64>>();
    (!count_from_zero).then(|| Tensor::from_slice(&indexes()))
}

/// Returns these parts of axis 1: a view for a single run.
fn parts(tensor: &Tensor, runs: &[Range<i64>]) -> Tensor {
    let part = |run: &Range<i64>| tensor.narrow(1, run.start, run.end - run.start);
    match runs {
        [] => tensor.narrow(1, 0, 0),
        [run] => part(run),
        runs => Tensor::cat(&runs.iter().map(part).collect::<Vec<_>>(), 1),
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// One row a sample: `1` is seen.
    fn mask(rows: &[&str]) -> Tensor {
        let rows: Vec<Tensor> = rows
            .iter()
            .map(|row| {
                Tensor::from_slice(&row.bytes().map(|byte| byte == b'1').collect::<Vec<_>>())
            })
            .collect();
        Tensor::stack(&rows, 0)
    }

    /// Indexes of the kept tokens, and the rows of the mask that remains.
    fn seen(rows: &[&str], at_least_one: bool) -> (Vec<i64>, Option<Vec<String>>) {
        let mask = mask(rows);
        let numbers = Tensor::arange(mask.size()[1], (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let SeenTokens { tokens, mask, places } =
            SeenTokens::by_mask(&numbers, &mask, at_least_one);
        let kept = Vec::<i64>::try_from(tokens.get(0)).expect("int64");
        let places = places.map(|places| Vec::<i64>::try_from(places).expect("int64"));
        let first: Vec<i64> = (0..kept.len() as i64).collect();
        assert_eq!(places, (kept != first).then(|| kept.clone()), "{rows:?}");
        let shown = |row: Vec<bool>| row.into_iter().map(|seen| if seen { '1' } else { '0' });
        let rows = |mask: Tensor| {
            let rows = Vec::<Vec<bool>>::try_from(mask).expect("[B, kept] booleans");
            rows.into_iter().map(|row| shown(row).collect()).collect()
        };
        (kept, mask.map(rows))
    }

    fn masked(rows: &[&str]) -> Option<Vec<String>> {
        Some(rows.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn texts_of_one_length_are_cut_to_it_and_need_no_mask() {
        assert_eq!(seen(&["11100", "11100"], true), (vec![0, 1, 2], None));
        assert_eq!(seen(&["111", "111", "111"], true), (vec![0, 1, 2], None));
        assert_eq!(seen(&["10000", "10000"], true), (vec![0], None));
    }

    #[test]
    fn texts_of_different_lengths_are_cut_to_the_longest_and_keep_a_mask() {
        assert_eq!(
            seen(&["11000", "11100", "10000"], true),
            (vec![0, 1, 2], masked(&["110", "111", "100"]))
        );
        assert_eq!(seen(&["111", "100"], true), (vec![0, 1, 2], masked(&["111", "100"])));
    }

    #[test]
    fn padding_before_and_within_texts_is_cut_where_all_samples_have_it() {
        assert_eq!(seen(&["00111", "00111"], true), (vec![2, 3, 4], None));
        assert_eq!(seen(&["01011", "01011"], true), (vec![1, 3, 4], None));
        assert_eq!(seen(&["01001"], true), (vec![1, 4], None), "a single sample never has a mask");
        assert_eq!(seen(&["01010", "01001"], true), (vec![1, 3, 4], masked(&["110", "101"])));
        assert_eq!(seen(&["0011", "1100"], true), (vec![0, 1, 2, 3], masked(&["0011", "1100"])));
    }

    #[test]
    fn texts_that_nobody_sees_are_cut_to_nothing_or_to_one_masked_token() {
        assert_eq!(seen(&["000", "000"], false), (vec![], None));
        assert_eq!(seen(&["000", "000"], true), (vec![0], masked(&["0", "0"])));
        assert_eq!(seen(&["000", "010"], true), (vec![1], masked(&["0", "1"])));
        assert_eq!(seen(&["", ""], true), (vec![], None), "there is no token to keep");
    }
}
