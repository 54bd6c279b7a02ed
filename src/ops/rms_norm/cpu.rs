//! Root-mean-square normalization and its gradient in one pass over a CPU's memory.

use half::bf16;
use tch::{Kind, Tensor};

use super::{RmsNorm, Saved};
use crate::ops::Rounding;
use crate::ops::lanes::{LANES, Sums, Vector, vectorized, vectors, vectors_mut};
use crate::tensor::{Element, elements, elements_mut};

pub fn forward(norm: RmsNorm, x: &Tensor, weight: &Tensor) -> Tensor {
    match x.kind() {
        Kind::BFloat16 => forward_in::<bf16>(norm, x, weight),
        _ => forward_in::<f32>(norm, x, weight),
    }
}

fn forward_in<T: Element>(norm: RmsNorm, x: &Tensor, weight: &Tensor) -> Tensor {
    let mut output = x.empty_like();
    let (rows, weight) = (vectors(elements::<T>(x)), vectors(elements::<T>(weight)));
    values(rows, weight, norm, vectors_mut(elements_mut(&mut output)));
    output
}

pub fn backward(norm: RmsNorm, saved: &Saved, grad_output: &Tensor) -> [Tensor; 2] {
    match saved.x.kind() {
        Kind::BFloat16 => backward_in::<bf16>(norm, saved, grad_output),
        _ => backward_in::<f32>(norm, saved, grad_output),
    }
}

fn backward_in<T: Element>(norm: RmsNorm, saved: &Saved, grad_output: &Tensor) -> [Tensor; 2] {
    let Saved { x, weight } = saved;
    let mut grad_x = x.empty_like();
    let grad_weight = gradients(
        vectors(elements::<T>(x)),
        vectors(elements::<T>(weight)),
        vectors(elements::<T>(grad_output)),
        norm.epsilon as f32,
        vectors_mut(elements_mut(&mut grad_x)),
    );
    [grad_x, Tensor::from_slice(&grad_weight).to_kind(T::KIND)]
}

vectorized! {
    fn values<T>(
        x: &[Vector<T>], weight: &[Vector<T>], norm: RmsNorm, into: &mut [Vector<T>],
    ) = values_loop;
}

#[inline(always)]
fn values_loop<T: Element>(
    x: &[Vector<T>],
    weight: &[Vector<T>],
    norm: RmsNorm,
    into: &mut [Vector<T>],
) {
    let epsilon = norm.epsilon as f32;
    let rounds_before_scale = norm.rounding == Rounding::EachStep;
    for (into, x) in into.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
        let inverse = inverse(x, epsilon);
        for ((into, x), weight) in into.iter_mut().zip(x).zip(weight) {
            for lane in 0..LANES {
                let normalized = x[lane].widened() * inverse;
                let normalized = match rounds_before_scale {
                    true => T::rounded(normalized).widened(),
                    false => normalized,
                };
                into[lane] = T::rounded(normalized * weight[lane].widened());
            }
        }
    }
}

/// 1 / sqrt(mean(x²) + epsilon).
#[inline(always)]
fn inverse<T: Element>(x: &[Vector<T>], epsilon: f32) -> f32 {
    let mut sums = [0f32; LANES];
    for vector in x {
        for (sum, x) in sums.iter_mut().zip(vector) {
            *sum += x.widened() * x.widened();
        }
    }
    1.0 / (sums.iter().sum::<f32>() / (x.len() * LANES) as f32 + epsilon).sqrt()
}

vectorized! {
    fn gradients<T>(
        x: &[Vector<T>], weight: &[Vector<T>], grad_output: &[Vector<T>], epsilon: f32,
        into: &mut [Vector<T>],
    ) -> Vec<f64> = gradients_loop;
}

/// Computes the gradient of `x` into its place and returns that of the weight. With n = x · inverse
/// and g the gradient of n they are inverse · (g − n · mean(g · n)) and the sum of grad_output · n.
#[inline(always)]
fn gradients_loop<T: Element>(
    x: &[Vector<T>],
    weight: &[Vector<T>],
    grad_output: &[Vector<T>],
    epsilon: f32,
    into: &mut [Vector<T>],
) -> Vec<f64> {
    let width = weight.len();
    let mut grad_weight = Sums::new(width);
    let rows = into.chunks_exact_mut(width).zip(x.chunks_exact(width));
    for ((into, x), grad_output) in rows.zip(grad_output.chunks_exact(width)) {
        let inverse = inverse(x, epsilon);
        let mut products = [0f32; LANES];
        let sums = grad_weight.row().iter_mut();
        for (((sum, x), grad_output), weight) in sums.zip(x).zip(grad_output).zip(weight) {
            for lane in 0..LANES {
                let product = grad_output[lane].widened() * x[lane].widened() * inverse;
                sum[lane] += product;
                products[lane] += product * weight[lane].widened();
            }
        }
        let mean = products.iter().sum::<f32>() / (width * LANES) as f32;
        for (((into, x), grad_output), weight) in
            into.iter_mut().zip(x).zip(grad_output).zip(weight)
        {
            for lane in 0..LANES {
                let normalized = x[lane].widened() * inverse;
                let gradient = grad_output[lane].widened() * weight[lane].widened();
                into[lane] = T::rounded(inverse * (gradient - normalized * mean));
            }
        }
    }
    grad_weight.taken()
}
