//! The gate and its gradients in one pass over a CPU's memory.

use half::bf16;
use tch::{Kind, Tensor};

use super::{SiluGate, half_of};
use crate::ops::OfFeatures;
use crate::ops::lanes::{exp, vectorized};
use crate::tensor::{Element, elements, elements_mut};

pub fn forward(x: &Tensor) -> Tensor {
    let (mut output, width) = (half_of(x), SiluGate::width(x) as usize);
    match x.kind() {
        Kind::BFloat16 => values::<bf16>(elements(x), width, elements_mut(&mut output)),
        _ => values::<f32>(elements(x), width, elements_mut(&mut output)),
    }
    output
}

pub fn backward(x: &Tensor, grad_output: &Tensor) -> Tensor {
    match x.kind() {
        Kind::BFloat16 => backward_in::<bf16>(x, grad_output),
        _ => backward_in::<f32>(x, grad_output),
    }
}

fn backward_in<T: Element>(x: &Tensor, grad_output: &Tensor) -> Tensor {
    let (mut gradient, width) = (x.empty_like(), SiluGate::width(x) as usize);
    let into = elements_mut(&mut gradient);
    gradients::<T>(elements(x), elements(grad_output), width, into);
    gradient
}

vectorized! {
    fn values<T>(x: &[T], width: usize, into: &mut [T]) = values_loop;
}

#[inline(always)]
fn values_loop<T: Element>(x: &[T], width: usize, into: &mut [T]) {
    for (into, x) in into.chunks_exact_mut(width).zip(x.chunks_exact(2 * width)) {
        let (gates, factors) = x.split_at(width);
        for ((into, gate), factor) in into.iter_mut().zip(gates).zip(factors) {
            let gate = gate.widened();
            let active = T::rounded(gate * Sigmoid::of(gate).value).widened();
            *into = T::rounded(active * factor.widened());
        }
    }
}

vectorized! {
    fn gradients<T>(x: &[T], grad_output: &[T], width: usize, into: &mut [T]) = gradients_loop;
}

#[inline(always)]
fn gradients_loop<T: Element>(x: &[T], grad_output: &[T], width: usize, into: &mut [T]) {
    let rows = into.chunks_exact_mut(2 * width).zip(x.chunks_exact(2 * width));
    for ((into, x), grad_output) in rows.zip(grad_output.chunks_exact(width)) {
        let (gates, factors) = x.split_at(width);
        let (into_gates, into_factors) = into.split_at_mut(width);
        let into = into_gates.iter_mut().zip(into_factors);
        for ((into, grad_output), (gate, factor)) in
            into.zip(grad_output).zip(gates.iter().zip(factors))
        {
            let (gate, gradient) = (gate.widened(), grad_output.widened());
            let Sigmoid { value, rest } = Sigmoid::of(gate);
            let of_active = T::rounded(gradient * factor.widened()).widened();
            *into.0 = T::rounded(of_active * (value * gate.mul_add(rest, 1.0)));
            *into.1 = T::rounded(gradient * T::rounded(gate * value).widened());
        }
    }
}

/// 1 / (1 + exp(−x)).
struct Sigmoid {
    value: f32,
    /// 1 − value.
    rest: f32,
}

impl Sigmoid {
    #[inline(always)]
    fn of(x: f32) -> Self {
        let power = exp(-x);
        let value = 1.0 / (1.0 + power);
        Sigmoid { value, rest: power * value }
    }
}
