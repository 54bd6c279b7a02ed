//! GELU and its gradient in one pass over a CPU's memory.

use half::bf16;
use tch::{Kind, Tensor};

use crate::ops::lanes::{exp, vectorized};
use crate::tensor::{Element, elements, elements_mut};

/// 2 · sqrt(2/π), and the factor of the cube.
const SCALE: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

pub fn forward(x: &Tensor) -> Tensor {
    let mut output = x.empty_like();
    match x.kind() {
        Kind::BFloat16 => values::<bf16>(elements(x), elements_mut(&mut output)),
        _ => values::<f32>(elements(x), elements_mut(&mut output)),
    }
    output
}

pub fn backward(x: &Tensor, grad_output: &Tensor) -> Tensor {
    let mut gradient = x.empty_like();
    let into = &mut gradient;
    match x.kind() {
        Kind::BFloat16 => gradients::<bf16>(elements(x), elements(grad_output), elements_mut(into)),
        _ => gradients::<f32>(elements(x), elements(grad_output), elements_mut(into)),
    }
    gradient
}

vectorized! {
    fn values<T>(x: &[T], into: &mut [T]) = values_loop;
}

#[inline(always)]
fn values_loop<T: Element>(x: &[T], into: &mut [T]) {
    for (into, x) in into.iter_mut().zip(x) {
        let x = x.widened();
        *into = T::rounded(x * Halves::of(x).half);
    }
}

vectorized! {
    fn gradients<T>(x: &[T], grad_output: &[T], into: &mut [T]) = gradients_loop;
}

#[inline(always)]
fn gradients_loop<T: Element>(x: &[T], grad_output: &[T], into: &mut [T]) {
    for ((into, x), grad_output) in into.iter_mut().zip(x).zip(grad_output) {
        *into = T::rounded(grad_output.widened() * slope(x.widened()));
    }
}

/// (1 + tanh(u/2)) / 2 = 1 / (1 + exp(−u)).
struct Halves {
    half: f32,
    /// 1 − half.
    rest: f32,
}

impl Halves {
    #[inline(always)]
    fn of(x: f32) -> Self {
        let power = exp(-SCALE * x * (CUBE * x).mul_add(x, 1.0));
        let half = 1.0 / (1.0 + power);
        Halves { half, rest: power * half }
    }
}

#[inline(always)]
fn slope(x: f32) -> f32 {
    let Halves { half, rest } = Halves::of(x);
    let inner = SCALE * (3.0 * CUBE * x).mul_add(x, 1.0);
    (x * half * rest).mul_add(inner, half)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_out_it_is_zero_and_the_identity() {
        let output = forward(&Tensor::from_slice(&[-1e30f32, -100.0, 100.0, 1e30]));
        let output = elements::<f32>(&output);
        assert_eq!(output[2..], [100.0, 1e30]);
        assert!(output[..2].iter().all(|y| y.abs() < 1e-6), "{output:?}");
    }
}
