//! The update in a single pass over a CPU's memory, in the vectors that the processor has.
//!
//! An element's four numbers are read once and three of them written once, with the copy in
//! bfloat16: 28 to 30 bytes, where the operators move 130.

use std::ops::Range;
use std::thread;

use half::bf16;
use multiversion::multiversion;

use super::Factors;
use crate::optim::Slice;
use crate::tensor::{Element, elements, elements_mut};

/// Elements for which a further thread is worth its start, which takes as long as some ten thousand
/// elements.
pub(super) const SHARE: usize = 1 << 18;

/// One part of a slice, whose parameters all decay or all do not.
struct Run<'a> {
    params: &'a mut [f32],
    gradient: &'a [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
    /// Empty where nothing is computed in bfloat16.
    computed: &'a mut [bf16],
    decays: bool,
}

/// Rounds as the operators do, but for the root, which is exact here, and for its correction.
pub(super) fn update(slice: Slice<'_>, factors: Factors) {
    let Slice { params, gradient, state, computed, decayed, .. } = slice;
    let [exp_avg, exp_avg_sq] = state else {
        panic!("AdamW keeps two tensors a slice, found {}", state.len())
    };
    let gradient = gradient.contiguous();
    let rest = Run {
        params: elements_mut(params),
        gradient: elements(&gradient),
        exp_avg: elements_mut(exp_avg),
        exp_avg_sq: elements_mut(exp_avg_sq),
        computed: computed.map_or(&mut [], elements_mut),
        decays: false,
    };
    let num_threads = usize::try_from(tch::get_num_threads()).unwrap_or(1);
    let share = rest.params.len().div_ceil(num_threads).max(SHARE);
    thread::scope(|scope| {
        let mut shares = rest.split(decayed, share);
        // The first share is this thread's own: with one thread none is started.
        let own = shares.next();
        for runs in shares {
            scope.spawn(move || runs.into_iter().for_each(|run| update_run(run, factors)));
        }
        own.into_iter().flatten().for_each(|run| update_run(run, factors));
    });
}

impl<'a> Run<'a> {
    /// Shares of `share` elements, each cut where decay begins and ends.
    fn split(self, decayed: &[(i64, i64)], share: usize) -> impl Iterator<Item = Vec<Run<'a>>> {
        let mut rest = self;
        let pieces = pieces(rest.params.len(), decayed, share);
        pieces.into_iter().map(move |pieces| {
            pieces.into_iter().map(|(range, decays)| rest.take(range.len(), decays)).collect()
        })
    }

    /// Takes the first elements off.
    fn take(&mut self, length: usize, decays: bool) -> Run<'a> {
        let copied = if self.computed.is_empty() { 0 } else { length };
        Run {
            params: self.params.split_off_mut(..length).expect("within the slice"),
            gradient: self.gradient.split_off(..length).expect("as long as the parameters"),
            exp_avg: self.exp_avg.split_off_mut(..length).expect("as long as the parameters"),
            exp_avg_sq: self.exp_avg_sq.split_off_mut(..length).expect("as long as the parameters"),
            computed: self
                .computed
                .split_off_mut(..copied)
                .expect("as long as the parameters, or empty"),
            decays,
        }
    }
}

#[multiversion(targets = "simd")]
fn update_run<'a>(run: Run<'a>, factors: Factors) {
    let Run { params, gradient, exp_avg, exp_avg_sq, computed, decays } = run;
    let [gradient_factor, beta2, eps, move_by] =
        [factors.gradient, factors.beta2, factors.eps, factors.move_by].map(|f| f as f32);
    let [fresh1, fresh2] = [1.0 - factors.beta1, 1.0 - factors.beta2].map(|f| f as f32);
    let decay = if decays { factors.decay as f32 } else { 1.0 };
    // Instead of a division of each element: another rounding, within what the operators differ by
    // among themselves.
    let correction = 1.0 / factors.root_correction as f32;
    let length = params.len();
    let (gradient, exp_avg, exp_avg_sq) =
        (&gradient[..length], &mut exp_avg[..length], &mut exp_avg_sq[..length]);
    for index in 0..length {
        let gradient = gradient[index] * gradient_factor;
        let mean = fresh1.mul_add(gradient - exp_avg[index], exp_avg[index]);
        let square = (gradient * fresh2).mul_add(gradient, exp_avg_sq[index] * beta2);
        let denominator = square.sqrt() * correction + eps;
        exp_avg[index] = mean;
        exp_avg_sq[index] = square;
        params[index] = params[index] * decay + 1.0 / denominator * mean * move_by;
    }
    // While the run is in the cache.
    for (computed, param) in computed.iter_mut().zip(&*params) {
        *computed = bf16::rounded(*param);
    }
}

/// Ranges of `0..length` with whether they decay, in shares.
fn pieces(length: usize, decayed: &[(i64, i64)], share: usize) -> Vec<Vec<(Range<usize>, bool)>> {
    let decayed: Vec<Range<usize>> = decayed
        .iter()
        .map(|&(offset, length)| offset as usize..(offset + length) as usize)
        .collect();
    let mut cuts: Vec<usize> = decayed
        .iter()
        .flat_map(|run| [run.start, run.end])
        .chain((0..length).step_by(BLOCK))
        .chain([length])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let ranges = cuts.windows(2).map(|cut| cut[0]..cut[1]);
    let with_decay =
        ranges.map(|range| (range.clone(), decayed.iter().any(|run| run.contains(&range.start))));
    let mut shares: Vec<Vec<(Range<usize>, bool)>> = Vec::new();
    for (range, decays) in with_decay {
        match shares.last_mut() {
            Some(last) if last.first().is_some_and(|first| range.start - first.0.start < share) => {
                last.push((range, decays))
            }
            _ => shares.push(vec![(range, decays)]),
        }
    }
    shares
}

/// Elements of a run at most, so that what is rounded to bfloat16 is still in the cache.
const BLOCK: usize = 1 << 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_slice_once_and_know_what_decays() {
        for (length, share) in [(0, 10), (1, 10), (10_000, 100_000), (100_000, 9_000)] {
            let decayed = [(0, length / 3), (length / 2, length - length / 2)];
            let pieces = pieces(length as usize, &decayed, share);
            let mut end = 0;
            for (range, decays) in pieces.iter().flatten() {
                assert_eq!(range.start, end);
                let within = |at: usize| {
                    decayed
                        .iter()
                        .any(|(offset, length)| (*offset..offset + length).contains(&(at as i64)))
                };
                assert!(range.clone().all(|at| within(at) == *decays));
                end = range.end;
            }
            assert_eq!(end, length as usize);
            let lengths: Vec<usize> = pieces
                .iter()
                .map(|pieces| pieces.iter().map(|(range, _)| range.len()).sum())
                .collect();
            assert!(lengths.iter().all(|length| *length < share + BLOCK), "{lengths:?}");
        }
    }
}
