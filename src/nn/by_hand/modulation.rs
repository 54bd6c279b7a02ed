//! Modulated layer normalization, and the gated sum behind it.
//!
//! Between the kinds of the tokens and of the modulation lies what families differ in: every
//! intermediate number has the modulation's. With one in bfloat16 each step is rounded, as
//! diffusers rounds FLUX's; with one in f32 the result alone, as Wan's.

use half::bf16;
use tch::{Kind, Tensor};

use super::fits;
use super::vectors::{LANES, Sums, vectors, vectors_mut};
use crate::autograd::by_hand;
use crate::tensor::{Element, elements, elements_mut};

/// `n · factor + shift`, with n of mean 0 and variance 1 over the last axis.
///
/// # Shapes
/// `x`: `[B, L, D]`; `factor`, `shift`: `[B, 1, D]`, or `[D]` for all samples. Returns the shape
/// and kind of `x`, none where libtorch's operators are to do it.
///
/// Source: Ba et al. 2016, arXiv:1607.06450, section 3.
pub fn affine_norm(x: &Tensor, factor: &Tensor, shift: &Tensor, epsilon: f64) -> Option<Tensor> {
    let fit =
        fits_rows(x, factor) && factor.size() == shift.size() && factor.kind() == shift.kind();
    fit.then(|| match (x.kind(), factor.kind()) {
        (Kind::BFloat16, Kind::BFloat16) => {
            normalized::<bf16, bf16>(x, factor, shift, epsilon as f32)
        }
        (Kind::BFloat16, _) => normalized::<bf16, f32>(x, factor, shift, epsilon as f32),
        _ => normalized::<f32, f32>(x, factor, shift, epsilon as f32),
    })
}

/// `x + gate · change`.
///
/// # Shapes
/// `x`, `change`: `[B, L, D]`; `gate`: `[B, 1, D]`. Returns the shape and kind of `x`, none where
/// libtorch's operators are to do it.
pub fn gated(x: &Tensor, gate: &Tensor, change: &Tensor) -> Option<Tensor> {
    let fit = fits_rows(x, gate) && x.size() == change.size() && x.kind() == change.kind();
    fit.then(|| match (x.kind(), gate.kind()) {
        (Kind::BFloat16, Kind::BFloat16) => summed::<bf16, bf16>(x, gate, change),
        (Kind::BFloat16, _) => summed::<bf16, f32>(x, gate, change),
        _ => summed::<f32, f32>(x, gate, change),
    })
}

/// Whether these kinds fit, the rows vectors, and whether each sample, or all together, have a row
/// of the modulation.
fn fits_rows(x: &Tensor, modulation: &Tensor) -> bool {
    let Ok((batch, _, width)) = x.size3() else { return false };
    let rows = [vec![batch, 1, width], vec![width]].contains(&modulation.size());
    let kinds = x.kind() == modulation.kind() || modulation.kind() == Kind::Float;
    fits(x) && fits(modulation) && kinds && rows && width % LANES as i64 == 0
}

/// Vectors of a row.
fn width(x: &Tensor) -> usize {
    *x.size().last().expect("[B, L, D]") as usize / LANES
}

fn normalized<T: Element, M: Element>(
    x: &Tensor,
    factor: &Tensor,
    shift: &Tensor,
    epsilon: f32,
) -> Tensor {
    let (width, shape) = (width(x), factor.size());
    let forward = || {
        let [x, factor, shift] = [x, factor, shift].map(|tensor| tensor.detach().contiguous());
        let mut output = x.empty_like();
        let modulation = [&factor, &shift].map(|tensor| vectors(elements::<M>(tensor)));
        let moments = normalize(
            vectors(elements::<T>(&x)),
            modulation,
            (width, epsilon),
            vectors_mut(elements_mut(&mut output)),
        );
        (output, (x, factor, moments))
    };
    by_hand(&[x, factor, shift], forward, move |(x, factor, moments), grad_output| {
        let (mut grad_x, grad_output) = (x.empty_like(), grad_output.contiguous());
        let read = [&x, &grad_output].map(|tensor| vectors(elements::<T>(tensor)));
        let into = vectors_mut(elements_mut(&mut grad_x));
        let sums = normalize_backward(read, vectors(elements::<M>(&factor)), &moments, width, into);
        let [grad_factor, grad_shift] = sums.map(|sum| summed_tensor::<M>(&sum, &shape));
        vec![grad_x, grad_factor, grad_shift]
    })
}

fn summed<T: Element, M: Element>(x: &Tensor, gate: &Tensor, change: &Tensor) -> Tensor {
    let (width, shape) = (width(x), gate.size());
    let forward = || {
        let [x, gate, change] = [x, gate, change].map(|tensor| tensor.detach().contiguous());
        let mut output = x.empty_like();
        let read = [&x, &change].map(|tensor| vectors(elements::<T>(tensor)));
        add(read, vectors(elements::<M>(&gate)), width, vectors_mut(elements_mut(&mut output)));
        (output, (gate, change))
    };
    by_hand(&[x, gate, change], forward, move |(gate, change), grad_output| {
        let (mut grad_change, grad_output) = (change.empty_like(), grad_output.contiguous());
        let read = [&change, &grad_output].map(|tensor| vectors(elements::<T>(tensor)));
        let sum = add_backward(
            read,
            vectors(elements::<M>(&gate)),
            width,
            vectors_mut(elements_mut(&mut grad_change)),
        );
        vec![grad_output, summed_tensor::<M>(&sum, &shape), grad_change]
    })
}

fn summed_tensor<M: Element>(sum: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(sum).to_kind(M::KIND).view(shape)
}

/// Mean of a row, and one over the root of its variance and epsilon.
type Moments = (f32, f32);

#[inline(always)]
fn moments<T: Element>(row: &[[T; LANES]], epsilon: f32) -> Moments {
    let count = (row.len() * LANES) as f32;
    let mean_of = |number: &dyn Fn(f32) -> f32| {
        let mut sums = [0f32; LANES];
        for vector in row {
            sums.iter_mut().zip(vector).for_each(|(sum, x)| *sum += number(x.widened()));
        }
        sums.iter().sum::<f32>() / count
    };
    let mean = mean_of(&|x| x);
    let variance = mean_of(&|x| (x - mean) * (x - mean));
    (mean, 1.0 / (variance + epsilon).sqrt())
}

vectorized! {
    fn normalize<T: Element, M: Element>(
        x: &[[T; LANES]],
        [factor, shift]: [&[[M; LANES]]; 2],
        (width, epsilon): (usize, f32),
        into: &mut [[T; LANES]],
    ) -> Vec<Moments> {
        let of_modulation = x.len() / (factor.len() / width);
        let mut all = Vec::with_capacity(x.len() / width);
        let parts = into.chunks_exact_mut(of_modulation).zip(x.chunks_exact(of_modulation));
        for ((into, x), (factor, shift)) in parts.zip(factor.chunks_exact(width).zip(shift.chunks_exact(width))) {
            for (into, x) in into.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let (mean, inverse) = moments(x, epsilon);
                all.push((mean, inverse));
                for (((into, x), factor), shift) in into.iter_mut().zip(x).zip(factor).zip(shift) {
                    for lane in 0..LANES {
                        let normalized = M::rounded((x[lane].widened() - mean) * inverse).widened();
                        let scaled = M::rounded(normalized * factor[lane].widened()).widened();
                        into[lane] = T::rounded(M::rounded(scaled + shift[lane].widened()).widened());
                    }
                }
            }
        }
        all
    }
}

vectorized! {
    /// Gradient of `x`, into its place, and of factor and shift. With g the gradient of n it is
    /// inverse · (g − mean(g) − n · mean(g · n)); theirs are the sums of grad_output · n and of
    /// grad_output.
    fn normalize_backward<T: Element, M: Element>(
        [x, grad_output]: [&[[T; LANES]]; 2],
        factor: &[[M; LANES]],
        moments: &[Moments],
        width: usize,
        into: &mut [[T; LANES]],
    ) -> [Vec<f64>; 2] {
        let of_modulation = x.len() / (factor.len() / width);
        let count = (width * LANES) as f32;
        let [mut grad_factor, mut grad_shift] = [const { Vec::new() }; 2];
        let parts = into.chunks_exact_mut(of_modulation).zip(x.chunks_exact(of_modulation)).zip(grad_output.chunks_exact(of_modulation));
        let parts = parts.zip(factor.chunks_exact(width)).zip(moments.chunks_exact(of_modulation / width));
        for ((((into, x), grad_output), factor), moments) in parts {
            let (mut of_factor, mut of_shift) = (Sums::new(width), Sums::new(width));
            let rows = into.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad_output.chunks_exact(width)).zip(moments);
            for (((into, x), grad_output), (mean, inverse)) in rows {
                let (mut gradients, mut products) = ([0f32; LANES], [0f32; LANES]);
                let sums = of_factor.row().iter_mut().zip(of_shift.row());
                for ((((of_factor, of_shift), x), grad_output), factor) in sums.zip(x).zip(grad_output).zip(factor) {
                    for lane in 0..LANES {
                        let (normalized, grad_output) = ((x[lane].widened() - mean) * inverse, grad_output[lane].widened());
                        let gradient = grad_output * factor[lane].widened();
                        of_factor[lane] += grad_output * normalized;
                        of_shift[lane] += grad_output;
                        gradients[lane] += gradient;
                        products[lane] += gradient * normalized;
                    }
                }
                let [gradient_mean, product_mean] = [gradients, products].map(|sums| sums.iter().sum::<f32>() / count);
                for (((into, x), grad_output), factor) in into.iter_mut().zip(x).zip(grad_output).zip(factor) {
                    for lane in 0..LANES {
                        let normalized = (x[lane].widened() - mean) * inverse;
                        let gradient = grad_output[lane].widened() * factor[lane].widened();
                        into[lane] = T::rounded(inverse * (gradient - gradient_mean - normalized * product_mean));
                    }
                }
            }
            grad_factor.extend(of_factor.taken());
            grad_shift.extend(of_shift.taken());
        }
        [grad_factor, grad_shift]
    }
}

vectorized! {
    fn add<T: Element, M: Element>([x, change]: [&[[T; LANES]]; 2], gate: &[[M; LANES]], width: usize, into: &mut [[T; LANES]]) {
        let of_modulation = x.len() / (gate.len() / width);
        let parts = into.chunks_exact_mut(of_modulation).zip(x.chunks_exact(of_modulation)).zip(change.chunks_exact(of_modulation));
        for (((into, x), change), gate) in parts.zip(gate.chunks_exact(width)) {
            for (((into, x), change), gate) in into.iter_mut().zip(x).zip(change).zip(gate.iter().cycle()) {
                for lane in 0..LANES {
                    let product = M::rounded(gate[lane].widened() * change[lane].widened()).widened();
                    into[lane] = T::rounded(x[lane].widened() + product);
                }
            }
        }
    }
}

vectorized! {
    /// Gradient of the change, into its place, and of the gate.
    fn add_backward<T: Element, M: Element>(
        [change, grad_output]: [&[[T; LANES]]; 2],
        gate: &[[M; LANES]],
        width: usize,
        into: &mut [[T; LANES]],
    ) -> Vec<f64> {
        let of_modulation = change.len() / (gate.len() / width);
        let mut grad_gate = Vec::new();
        let parts = into.chunks_exact_mut(of_modulation).zip(change.chunks_exact(of_modulation)).zip(grad_output.chunks_exact(of_modulation));
        for (((into, change), grad_output), gate) in parts.zip(gate.chunks_exact(width)) {
            let mut of_gate = Sums::new(width);
            for ((into, change), grad_output) in into.chunks_exact_mut(width).zip(change.chunks_exact(width)).zip(grad_output.chunks_exact(width)) {
                let sums = of_gate.row();
                for ((((sum, into), change), grad_output), gate) in sums.iter_mut().zip(into).zip(change).zip(grad_output).zip(gate) {
                    for lane in 0..LANES {
                        sum[lane] += grad_output[lane].widened() * change[lane].widened();
                        into[lane] = T::rounded(grad_output[lane].widened() * gate[lane].widened());
                    }
                }
            }
            grad_gate.extend(of_gate.taken());
        }
        grad_gate
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use tch::Device;

    use super::*;

    /// Kinds of tokens and modulation, and how far one rounding of each lets numbers be off.
    const KINDS: [(Kind, Kind, f64); 3] = [
        (Kind::Float, Kind::Float, 2e-6),
        (Kind::BFloat16, Kind::Float, 6e-3),
        (Kind::BFloat16, Kind::BFloat16, 1.2e-2),
    ];

    #[test]
    fn a_modulated_norm_is_libtorchs() {
        for (kind, of_modulation, tolerance) in KINDS {
            for shape in [vec![2, 1, 48], vec![48]] {
                let inputs = [
                    draw(&[2, 70, 48], kind, 1) * 3.0 + 1.0,
                    draw(&shape, of_modulation, 2),
                    draw(&shape, of_modulation, 3),
                ];
                let by_hand = |inputs: &[Tensor]| {
                    affine_norm(&inputs[0], &inputs[1], &inputs[2], 1e-6).expect("it fits")
                };
                let plain = |inputs: &[Tensor]| {
                    inputs[0].layer_norm([48], None::<&Tensor>, None::<&Tensor>, 1e-6, false)
                        * &inputs[1]
                        + &inputs[2]
                };
                agree(&inputs, tolerance, by_hand, plain);
            }
        }
    }

    #[test]
    fn a_gated_sum_is_libtorchs() {
        for (kind, of_gate, tolerance) in KINDS {
            let inputs = [
                draw(&[2, 70, 48], kind, 1),
                draw(&[2, 1, 48], of_gate, 2),
                draw(&[2, 70, 48], kind, 3),
            ];
            let by_hand =
                |inputs: &[Tensor]| gated(&inputs[0], &inputs[1], &inputs[2]).expect("it fits");
            agree(&inputs, tolerance, by_hand, |inputs| &inputs[0] + &inputs[1] * &inputs[2]);
        }
    }

    #[test]
    fn each_step_is_rounded_to_the_modulations_kind() {
        tch::set_num_threads(1);
        let (x, change) =
            (draw(&[2, 70, 48], Kind::BFloat16, 1), draw(&[2, 70, 48], Kind::BFloat16, 2));
        for kind in [Kind::BFloat16, Kind::Float] {
            let (factor, shift) = (draw(&[2, 1, 48], kind, 3), draw(&[2, 1, 48], kind, 4));
            let wide = |tensor: &Tensor| tensor.to_kind(kind);
            let normalized =
                wide(&x).layer_norm([48], None::<&Tensor>, None::<&Tensor>, 1e-6, false) * &factor
                    + &shift;
            let sum = (wide(&x) + &factor * &change).to_kind(Kind::BFloat16);
            assert!(gated(&x, &factor, &change).expect("it fits").equal(&sum), "{kind:?}");
            let found = affine_norm(&x, &factor, &shift, 1e-6).expect("it fits");
            // Moments summed in another order may round a number in a thousand to its neighbour.
            let different = found
                .ne_tensor(&normalized.to_kind(Kind::BFloat16))
                .sum(Kind::Int64)
                .int64_value(&[]);
            assert!(different <= 6, "{different} of 6720 numbers differ, {kind:?}");
        }
    }

    #[test]
    fn other_shapes_are_left_to_libtorch() {
        tch::set_num_threads(1);
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        assert!(gated(&zeros(&[2, 3, 20]), &zeros(&[2, 1, 20]), &zeros(&[2, 3, 20])).is_none());
        assert!(gated(&zeros(&[2, 3, 16]), &zeros(&[2, 3, 16]), &zeros(&[2, 3, 16])).is_none());
        assert!(gated(&zeros(&[2, 0, 16]), &zeros(&[2, 1, 16]), &zeros(&[2, 0, 16])).is_none());
    }
}
