//! The update on a GPU: one kernel, one pass over memory, compiled when a run starts and compared
//! with the plain operators.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{AdamW, Factors, plain};
use crate::cuda::{Argument, Elementwise, Outcome, Source};
use crate::error::{Error, Result};
use crate::optim::{Slice, Update};

static KERNEL: Source = Source {
    file: "adamw/kernel.cu",
    text: include_str!("kernel.cu"),
    name: "adamw",
    kinds: &[Kind::Float, Kind::Float, Kind::Float, Kind::Float, Kind::BFloat16],
};

/// How many places the kernel's `Bounds` has: two for each decayed run.
const MOST_BOUNDS: usize = 256;

/// How far the kernel may be from libtorch's operators on the same GPU, relative to one plus a
/// value's size: some ten roundings. Their compiler fuses products and sums where it likes to, so
/// that no bits can be asked for.
const TOLERANCE: f64 = 1e-6;

/// Of the gradient, where the kernel is tried.
const FACTOR: f64 = 0.7;

/// AdamW as a kernel of one GPU.
///
/// The bits are those of the single pass on a CPU.
pub struct OnGpu {
    adamw: AdamW,
    kernel: Elementwise,
}

impl OnGpu {
    /// Compiles the kernel for `device` and sees that it computes what the plain operators do.
    /// `Device::Cpu` in place of a GPU is for a stand-in of the driver that works on the host's
    /// memory.
    ///
    /// # Errors
    /// [`Error::Environment`] if there is no compiler, if it or the driver refuses, and for other
    /// numbers. The plain operators are no silent substitute: they round differently, so that ranks
    /// would part, and a GPU or a compiler that computes wrongly is not to be trusted with a run.
    pub fn ready(adamw: &AdamW, device: Device) -> Result<Self> {
        let refused = |what| Error::environment(format!("AdamW's kernel on {device:?}: {what}"));
        let update = OnGpu {
            adamw: adamw.clone(),
            kernel: Elementwise::build(&KERNEL, device).map_err(refused)?,
        };
        update.check(device).map_err(refused)?;
        tracing::info!("AdamW's kernel on {device:?} computes what libtorch's operators compute");
        Ok(update)
    }

    /// Compares one update with the plain operators', on a slice that reaches every branch of the
    /// kernel.
    fn check(&self, device: Device) -> Outcome<()> {
        let mut found = sample(device);
        self.launch(found.slice(), self.adamw.factors(FACTOR, 0.01, 3))?;
        let mut expected = sample(device);
        plain::update(expected.slice(), self.adamw.factors(FACTOR, 0.01, 3));
        let both = found
            .state
            .iter()
            .chain([&found.params])
            .zip(expected.state.iter().chain([&expected.params]));
        let mut named = ["exp_avg", "exp_avg_sq", "parameters"].into_iter().zip(both);
        named.try_for_each(|(name, (found, expected))| compare(name, found, expected))?;
        let is_copy = found.computed.equal(&found.params.to_kind(Kind::BFloat16));
        if is_copy {
            Ok(())
        } else {
            Err("the parameters in bfloat16 are not those in float32, rounded".into())
        }
    }

    fn launch(&self, slice: Slice<'_>, factors: Factors) -> Outcome<()> {
        let Slice { params, gradient, state, computed, decayed, .. } = slice;
        let [exp_avg, exp_avg_sq] = state else {
            panic!("AdamW keeps two tensors a slice, found {}", state.len())
        };
        let gradient = gradient.contiguous();
        let Factors { gradient: factor, decay, beta1, beta2, root_correction, eps, move_by } =
            factors;
        let [factor, decay, fresh1, beta2, fresh2, root_correction, eps, move_by] =
            [factor, decay, 1.0 - beta1, beta2, 1.0 - beta2, root_correction, eps, move_by]
                .map(|number| number as f32);
        // The kernel's `Rule`.
        let rule = [factor, decay, fresh1, beta2, fresh2, 1.0 / root_correction, eps, move_by];
        let tensors =
            [Some(&*params), Some(&gradient), Some(exp_avg), Some(exp_avg_sq), computed.as_deref()];
        for Part { elements, bounds, num_bounds } in parts(params.numel() as i64, decayed) {
            let length = elements.end - elements.start;
            let part =
                tensors.map(|tensor| tensor.map(|tensor| tensor.narrow(0, elements.start, length)));
            let part: Vec<Option<&Tensor>> = part.iter().map(Option::as_ref).collect();
            self.kernel.run(
                length,
                &part,
                &[
                    Argument::Integers(&bounds),
                    Argument::Integers(&[num_bounds]),
                    Argument::Numbers(&rule),
                ],
            )?;
        }
        Ok(())
    }
}

/// Tensors to try the kernel with.
struct Sample {
    params: Tensor,
    gradient: Tensor,
    state: [Tensor; 2],
    computed: Tensor,
}

/// Numbers of both signs and of many sizes, without touching a generator; four at a time, and some
/// left over.
fn sample(device: Device) -> Sample {
    let wave = |pace: f64| (Tensor::arange(1003, (Kind::Float, device)) * pace).sin();
    Sample {
        params: wave(1.3),
        gradient: wave(1.9) * (wave(0.1) * 5.0).exp(),
        state: [wave(0.7) * 0.1, wave(2.9).square() * 0.1],
        computed: Tensor::zeros([1003], (Kind::BFloat16, device)),
    }
}

impl Sample {
    fn slice(&mut self) -> Slice<'_> {
        let Sample { params, gradient, state, computed } = self;
        // Runs that meet, and that begin and end among four.
        Slice {
            params,
            gradient,
            gradient_factor: FACTOR,
            state,
            computed: Some(computed),
            decayed: &[(2, 3), (5, 400), (701, 1)],
        }
    }
}

impl Update for OnGpu {
    /// # Panics
    /// Where the driver refuses, as libtorch's own operators do: mostly for what was queued
    /// earlier.
    fn update(&self, slice: Slice<'_>, lr: f64, step: u64) {
        let factors = self.adamw.factors(slice.gradient_factor, lr, step);
        self.launch(slice, factors).unwrap_or_else(|what| panic!("AdamW's kernel: {what}"));
    }
}

/// What one launch takes of a slice.
#[derive(Debug, PartialEq)]
struct Part {
    elements: Range<i64>,
    /// Where decay begins and ends, in turns, counted from the part's first element.
    bounds: [i64; MOST_BOUNDS],
    num_bounds: i64,
}

/// A slice is one part, unless it has more runs than a launch takes: 128 weight matrices with
/// something between them.
fn parts(length: i64, decayed: &[(i64, i64)]) -> Vec<Part> {
    let chunks: Vec<&[(i64, i64)]> =
        if decayed.is_empty() { vec![&[]] } else { decayed.chunks(MOST_BOUNDS / 2).collect() };
    // Each part ends where the first run of the next begins.
    let ends: Vec<i64> = chunks.iter().skip(1).map(|runs| runs[0].0).chain([length]).collect();
    let mut start = 0;
    let part = |(runs, end): (&&[(i64, i64)], i64)| {
        let elements = std::mem::replace(&mut start, end)..end;
        let mut bounds = [0; MOST_BOUNDS];
        let flat = runs.iter().flat_map(|&(offset, length)| [offset, offset + length]);
        bounds.iter_mut().zip(flat).for_each(|(bound, place)| *bound = place - elements.start);
        Part { elements, bounds, num_bounds: 2 * runs.len() as i64 }
    };
    chunks.iter().zip(ends).map(part).collect()
}

/// # Errors
/// The first element that is farther off than [`TOLERANCE`].
fn compare(name: &str, found: &Tensor, expected: &Tensor) -> Outcome<()> {
    let off = (found - expected).abs().gt_tensor(&((expected.abs() + 1.0) * TOLERANCE));
    // A NaN is no number to compare.
    let off = off.logical_or(&found.isfinite().logical_not());
    if !bool::try_from(off.any()).expect("one truth value") {
        return Ok(());
    }
    let element = off.to_kind(Kind::Int).argmax(None, false).int64_value(&[]);
    let [found, expected] = [found, expected].map(|tensor| tensor.double_value(&[element]));
    Err(format!(
        "{name} differ from those of libtorch's operators, element {element} is {found:e} and not {expected:e}: this GPU, its driver \
         or NVRTC computes wrongly, try others"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_one_part_with_the_bounds_of_its_runs() {
        let parts = parts(100, &[(2, 3), (5, 10)]);
        assert_eq!(parts.len(), 1);
        assert_eq!(
            (parts[0].elements.clone(), parts[0].num_bounds, &parts[0].bounds[..5]),
            (0..100, 4, &[2, 5, 5, 15, 0][..])
        );
    }

    #[test]
    fn a_slice_without_decay_is_a_part_too() {
        let parts = parts(100, &[]);
        assert_eq!((parts.len(), parts[0].elements.clone(), parts[0].num_bounds), (1, 0..100, 0));
    }

    #[test]
    fn more_runs_than_a_launch_takes_make_more_parts() {
        let runs: Vec<(i64, i64)> = (0..300).map(|run| (10 * run + 1, 4)).collect();
        let parts = parts(3000, &runs);
        let elements: Vec<Range<i64>> = parts.iter().map(|part| part.elements.clone()).collect();
        assert_eq!(elements, [0..1281, 1281..2561, 2561..3000]);
        assert_eq!(parts.iter().map(|part| part.num_bounds).collect::<Vec<_>>(), [256, 256, 88]);
        assert_eq!(parts[1].bounds[..3], [0, 4, 10]);
    }

    #[test]
    fn numbers_that_are_off_or_none_are_named() {
        let expected = Tensor::from_slice(&[1.0f32, 2.0, 3.0]);
        assert_eq!(
            compare("parameters", &Tensor::from_slice(&[1.0f32, 2.000_001, 3.0]), &expected),
            Ok(())
        );
        for (wrong, word) in [(2.000_01f32, "2.00001"), (f32::NAN, "NaN")] {
            let what = compare("parameters", &Tensor::from_slice(&[1.0f32, wrong, 3.0]), &expected)
                .expect_err("it is off");
            assert!(
                what.starts_with("parameters differ")
                    && what.contains("element 1 is ")
                    && what.contains(&word[..3]),
                "{what}"
            );
        }
    }
}
