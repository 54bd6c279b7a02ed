//! A slice on a GPU cut into launches of an optimizer's kernel.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::Slice;
use super::ema::by_kind;
use crate::cuda::{Argument, Elementwise, Outcome};

/// Places of a kernel's `Bounds`: two for each decayed run.
const MOST_BOUNDS: usize = 256;

/// Elements that one launch takes of a slice.
#[derive(Debug, PartialEq)]
struct Launch {
    elements: Range<i64>,
    /// Elements at which decay begins and ends, in turns, counted from the launch's first one.
    bounds: [i64; MOST_BOUNDS],
    num_bounds: i64,
}

/// Runs `kernel(params, gradient, narrow_gradient, state…, computed, average, narrow_average,
/// length, bounds, num_bounds, rule)` over a slice, behind all that libtorch has queued; of a
/// gradient and an average in bfloat16 the narrow one is given, of others the first. `rule`: the
/// same numbers for every element.
///
/// # Errors
/// The driver's refusal, perhaps of something that was queued earlier.
pub fn launch(kernel: &Elementwise, slice: Slice<'_>, rule: &[f32]) -> Outcome<()> {
    let Slice { params, gradient, state, computed, average, decayed, .. } = slice;
    let gradient = gradient.contiguous();
    let is_narrow = gradient.kind() == Kind::BFloat16;
    let (wide_gradient, narrow_gradient) =
        if is_narrow { (None, Some(&gradient)) } else { (Some(&gradient), None) };
    let (average, narrow_average) = by_kind(average);
    let tensors: Vec<Option<&Tensor>> = [Some(&*params), wide_gradient, narrow_gradient]
        .into_iter()
        .chain(state.iter().map(Some))
        .chain([computed.as_deref(), average.as_deref(), narrow_average.as_deref()])
        .collect();
    for Launch { elements, bounds, num_bounds } in launches(params.numel() as i64, decayed) {
        let length = elements.end - elements.start;
        let narrow = |tensor: &Tensor| tensor.narrow(0, elements.start, length);
        let taken: Vec<Option<Tensor>> = tensors.iter().map(|tensor| tensor.map(narrow)).collect();
        let taken: Vec<Option<&Tensor>> = taken.iter().map(Option::as_ref).collect();
        let arguments = [
            Argument::Integers(&bounds),
            Argument::Integers(&[num_bounds]),
            Argument::Numbers(rule),
        ];
        kernel.run(length, &taken, &arguments)?;
    }
    Ok(())
}

/// A slice is one launch, unless it has more runs than a launch takes: 128 weight matrices with
/// something between them.
fn launches(length: i64, decayed: &[(i64, i64)]) -> Vec<Launch> {
    let chunks: Vec<&[(i64, i64)]> =
        if decayed.is_empty() { vec![&[]] } else { decayed.chunks(MOST_BOUNDS / 2).collect() };
    // Each launch ends where the first run of the next begins.
    let ends: Vec<i64> = chunks.iter().skip(1).map(|runs| runs[0].0).chain([length]).collect();
    let mut start = 0;
    let launch = |(runs, end): (&&[(i64, i64)], i64)| {
        let elements = std::mem::replace(&mut start, end)..end;
        let mut bounds = [0; MOST_BOUNDS];
        let flat = runs.iter().flat_map(|&(offset, length)| [offset, offset + length]);
        bounds.iter_mut().zip(flat).for_each(|(bound, place)| *bound = place - elements.start);
        Launch { elements, bounds, num_bounds: 2 * runs.len() as i64 }
    };
    chunks.iter().zip(ends).map(launch).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_one_launch_with_the_bounds_of_its_runs() {
        let launches = launches(100, &[(2, 3), (5, 10)]);
        assert_eq!(launches.len(), 1);
        let Launch { elements, bounds, num_bounds } = &launches[0];
        assert_eq!((elements, *num_bounds, &bounds[..5]), (&(0..100), 4, &[2, 5, 5, 15, 0][..]));
    }

    #[test]
    fn a_slice_without_decay_is_a_launch_too() {
        let launches = launches(100, &[]);
        assert_eq!(launches.len(), 1);
        assert_eq!((&launches[0].elements, launches[0].num_bounds), (&(0..100), 0));
    }

    #[test]
    fn more_runs_than_a_launch_takes_make_more_launches() {
        let runs: Vec<(i64, i64)> = (0..300).map(|run| (10 * run + 1, 4)).collect();
        let launches = launches(3000, &runs);
        let elements: Vec<Range<i64>> =
            launches.iter().map(|launch| launch.elements.clone()).collect();
        assert_eq!(elements, [0..1281, 1281..2561, 2561..3000]);
        let bounds: Vec<i64> = launches.iter().map(|launch| launch.num_bounds).collect();
        assert_eq!(bounds, [256, 256, 88]);
        assert_eq!(launches[1].bounds[..3], [0, 4, 10]);
    }
}
