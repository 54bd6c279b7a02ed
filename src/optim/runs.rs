//! A slice on a CPU cut into runs of elements, for an optimizer's single pass over memory.

use std::ops::Range;
use std::thread;

use half::bf16;
use tch::Kind;

use super::Slice;
use super::ema::by_kind;
use crate::tensor::{elements, elements_mut};

/// Elements for which a further thread is worth its start, which takes as long as some ten thousand
/// elements.
pub const SHARE: usize = 1 << 18;

/// Elements of a run at most, so that what is rounded to bfloat16 is still in the cache.
const BLOCK: usize = 1 << 12;

/// Neighbouring elements of a slice whose parameters all decay or all do not, with the `S` numbers
/// that the optimizer keeps of each.
pub struct Run<'a, const S: usize> {
    pub params: &'a mut [f32],
    pub gradient: &'a [f32],
    pub state: [&'a mut [f32]; S],
    /// Empty where nothing is computed in bfloat16.
    pub computed: &'a mut [bf16],
    /// Empty where no average moves, or one in bfloat16.
    pub average: &'a mut [f32],
    /// Empty where no average moves, or one in f32.
    pub narrow_average: &'a mut [bf16],
    pub decays: bool,
}

/// A range of a slice's elements that all decay or all do not.
#[derive(Debug)]
struct Piece {
    elements: Range<usize>,
    decays: bool,
}

/// Calls `update` with every run of a slice, on as many threads as libtorch has.
///
/// # Panics
/// If the slice has another number of state tensors than `S` (a bug in the caller).
pub fn for_each_run<const S: usize>(slice: Slice<'_>, update: impl Fn(Run<'_, S>) + Sync) {
    let Slice { params, gradient, state, computed, average, decayed, .. } = slice;
    let kept = state.len();
    let state: &mut [_; S] =
        state.try_into().unwrap_or_else(|_| panic!("{S} tensors of state a slice, found {kept}"));
    let gradient = gradient.to_kind(Kind::Float).contiguous();
    let (average, narrow) = by_kind(average);
    let rest = Run {
        params: elements_mut(params),
        gradient: elements(&gradient),
        state: state.each_mut().map(elements_mut),
        computed: computed.map_or(&mut [], elements_mut),
        average: average.map_or(&mut [], elements_mut),
        narrow_average: narrow.map_or(&mut [], elements_mut),
        decays: false,
    };
    let num_threads = usize::try_from(tch::get_num_threads()).unwrap_or(1);
    let share = rest.params.len().div_ceil(num_threads).max(SHARE);
    let update = &update;
    thread::scope(|scope| {
        let mut shares = rest.split(decayed, share);
        // The first share is this thread's own: with one thread none is started.
        let own = shares.next();
        for runs in shares {
            scope.spawn(move || runs.into_iter().for_each(update));
        }
        own.into_iter().flatten().for_each(update);
    });
}

impl<'a, const S: usize> Run<'a, S> {
    /// Shares of `share` elements, each cut where decay begins and ends.
    fn split(self, decayed: &[(i64, i64)], share: usize) -> impl Iterator<Item = Vec<Self>> {
        let mut rest = self;
        let shares = shares(rest.params.len(), decayed, share);
        shares.into_iter().map(move |pieces| {
            pieces.into_iter().map(|piece| rest.take(piece.elements.len(), piece.decays)).collect()
        })
    }

    /// Takes the first elements off.
    fn take(&mut self, length: usize, decays: bool) -> Self {
        const WHOLE: &str = "as long as the parameters";
        const EMPTY_OR_WHOLE: &str = "as long, or empty";
        let of = |is_empty: bool| if is_empty { 0 } else { length };
        let copied = of(self.computed.is_empty());
        let averaged = of(self.average.is_empty());
        let narrow = of(self.narrow_average.is_empty());
        Run {
            params: self.params.split_off_mut(..length).expect("within the slice"),
            gradient: self.gradient.split_off(..length).expect(WHOLE),
            state: self.state.each_mut().map(|state| state.split_off_mut(..length).expect(WHOLE)),
            computed: self.computed.split_off_mut(..copied).expect(EMPTY_OR_WHOLE),
            average: self.average.split_off_mut(..averaged).expect(EMPTY_OR_WHOLE),
            narrow_average: self.narrow_average.split_off_mut(..narrow).expect(EMPTY_OR_WHOLE),
            decays,
        }
    }
}

/// Pieces of `0..length` in shares of at least `share` elements, the last one aside.
fn shares(length: usize, decayed: &[(i64, i64)], share: usize) -> Vec<Vec<Piece>> {
    let mut shares: Vec<Vec<Piece>> = Vec::new();
    for piece in pieces(length, decayed) {
        let fits = |last: &&mut Vec<Piece>| {
            last.first().is_some_and(|first| piece.elements.start - first.elements.start < share)
        };
        match shares.last_mut().filter(fits) {
            Some(last) => last.push(piece),
            None => shares.push(vec![piece]),
        }
    }
    shares
}

fn pieces(length: usize, decayed: &[(i64, i64)]) -> impl Iterator<Item = Piece> {
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
    let ranges: Vec<Range<usize>> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
    ranges.into_iter().map(move |elements| Piece {
        decays: decayed.iter().any(|run| run.contains(&elements.start)),
        elements,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_slice_once_and_know_what_decays() {
        for (length, share) in [(0, 10), (1, 10), (10_000, 100_000), (100_000, 9_000)] {
            let decayed = [(0, length / 3), (length / 2, length - length / 2)];
            let shares = shares(length as usize, &decayed, share);
            let mut end = 0;
            for Piece { elements, decays } in shares.iter().flatten() {
                assert_eq!(elements.start, end);
                let within = |element: usize| {
                    let runs = decayed.iter().map(|(offset, length)| *offset..offset + length);
                    runs.into_iter().any(|run| run.contains(&(element as i64)))
                };
                assert!(elements.clone().all(|element| within(element) == *decays));
                end = elements.end;
            }
            assert_eq!(end, length as usize);
            let lengths: Vec<usize> = shares
                .iter()
                .map(|pieces| pieces.iter().map(|piece| piece.elements.len()).sum())
                .collect();
            assert!(lengths.iter().all(|length| *length < share + BLOCK), "{lengths:?}");
        }
    }
}
