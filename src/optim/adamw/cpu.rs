//! The update in a single pass over a CPU's memory, in the vectors that the processor has.
//!
//! An element's four numbers are read once and three of them written once, with the copy in
//! bfloat16: 28 to 30 bytes, where the operators move 130. An average is read and written besides.

use half::bf16;
use multiversion::multiversion;

use super::Factors;
use crate::optim::Slice;
use crate::optim::runs::{Run, for_each_run};
use crate::tensor::Element;

/// Rounds as the operators do, but for the root, which is exact here, and for its correction.
pub(super) fn update(slice: Slice<'_>, factors: Factors) {
    for_each_run(slice, |run| update_run(run, factors));
}

#[multiversion(targets = "simd")]
fn update_run<'a>(run: Run<'a, 2>, factors: Factors) {
    let Run {
        params,
        gradient,
        state: [exp_avg, exp_avg_sq],
        computed,
        average,
        narrow_average,
        decays,
    } = run;
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
    let share = factors.average_share as f32;
    advance(average, params, share);
    advance(narrow_average, params, share);
}

/// Rounds as diffusers' EMAModel does: nothing is fused.
#[inline(always)]
fn advance<T: Element>(averages: &mut [T], params: &[f32], share: f32) {
    for (average, param) in averages.iter_mut().zip(params) {
        let before = average.widened();
        *average = T::rounded(before - share * (before - param));
    }
}
