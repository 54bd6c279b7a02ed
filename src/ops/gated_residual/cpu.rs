//! Gated residual and its gradient in one pass over a CPU's memory.
//!
//! `T` is the kind of the tokens, `M` that of the gate and of the intermediate product.

use half::bf16;
use tch::{Kind, Tensor};

use super::Saved;
use crate::ops::lanes::{LANES, Sums, Vector, vectorized, vectors, vectors_mut};
use crate::ops::modulation::{gradient, vectors_of_row};
use crate::tensor::{Element, elements, elements_mut};

pub fn forward(x: &Tensor, gate: &Tensor, change: &Tensor) -> Tensor {
    match (x.kind(), gate.kind()) {
        (Kind::BFloat16, Kind::BFloat16) => forward_in::<bf16, bf16>(x, gate, change),
        (Kind::BFloat16, _) => forward_in::<bf16, f32>(x, gate, change),
        _ => forward_in::<f32, f32>(x, gate, change),
    }
}

fn forward_in<T: Element, M: Element>(x: &Tensor, gate: &Tensor, change: &Tensor) -> Tensor {
    let mut output = x.empty_like();
    add::<T, M>(
        vectors(elements(x)),
        vectors(elements(change)),
        vectors(elements(gate)),
        vectors_of_row(x),
        vectors_mut(elements_mut(&mut output)),
    );
    output
}

/// Gradients of gate and change.
pub fn backward(saved: &Saved, grad_output: &Tensor) -> [Tensor; 2] {
    match (saved.change.kind(), saved.gate.kind()) {
        (Kind::BFloat16, Kind::BFloat16) => backward_in::<bf16, bf16>(saved, grad_output),
        (Kind::BFloat16, _) => backward_in::<bf16, f32>(saved, grad_output),
        _ => backward_in::<f32, f32>(saved, grad_output),
    }
}

fn backward_in<T: Element, M: Element>(saved: &Saved, grad_output: &Tensor) -> [Tensor; 2] {
    let Saved { gate, change } = saved;
    let mut grad_change = change.empty_like();
    let grad_gate = add_backward::<T, M>(
        vectors(elements(change)),
        vectors(elements(grad_output)),
        vectors(elements(gate)),
        vectors_of_row(change),
        vectors_mut(elements_mut(&mut grad_change)),
    );
    [gradient::<M>(&grad_gate, &gate.size()), grad_change]
}

vectorized! {
    fn add<T, M>(
        x: &[Vector<T>], change: &[Vector<T>], gate: &[Vector<M>], width: usize,
        into: &mut [Vector<T>],
    ) = add_loop;
}

/// `width`: vectors of a row.
#[inline(always)]
fn add_loop<T: Element, M: Element>(
    x: &[Vector<T>],
    change: &[Vector<T>],
    gate: &[Vector<M>],
    width: usize,
    into: &mut [Vector<T>],
) {
    // Vectors of the tokens that share a row of the gate.
    let sharing = x.len() / (gate.len() / width);
    let samples = into.chunks_exact_mut(sharing).zip(x.chunks_exact(sharing));
    let samples = samples.zip(change.chunks_exact(sharing));
    for (((into, x), change), gate) in samples.zip(gate.chunks_exact(width)) {
        let gates = gate.iter().cycle();
        for (((into, x), change), gate) in into.iter_mut().zip(x).zip(change).zip(gates) {
            for lane in 0..LANES {
                let product = M::rounded(gate[lane].widened() * change[lane].widened()).widened();
                into[lane] = T::rounded(x[lane].widened() + product);
            }
        }
    }
}

vectorized! {
    fn add_backward<T, M>(
        change: &[Vector<T>], grad_output: &[Vector<T>], gate: &[Vector<M>], width: usize,
        into: &mut [Vector<T>],
    ) -> Vec<f64> = add_backward_loop;
}

/// Computes the gradient of the change into its place and returns that of the gate.
#[inline(always)]
fn add_backward_loop<T: Element, M: Element>(
    change: &[Vector<T>],
    grad_output: &[Vector<T>],
    gate: &[Vector<M>],
    width: usize,
    into: &mut [Vector<T>],
) -> Vec<f64> {
    let sharing = change.len() / (gate.len() / width);
    let mut grad_gate = Vec::new();
    let samples = into.chunks_exact_mut(sharing).zip(change.chunks_exact(sharing));
    let samples = samples.zip(grad_output.chunks_exact(sharing));
    for (((into, change), grad_output), gate) in samples.zip(gate.chunks_exact(width)) {
        let mut of_gate = Sums::new(width);
        let rows = into.chunks_exact_mut(width).zip(change.chunks_exact(width));
        for ((into, change), grad_output) in rows.zip(grad_output.chunks_exact(width)) {
            row_backward(change, grad_output, gate, of_gate.row(), into);
        }
        grad_gate.extend(of_gate.taken());
    }
    grad_gate
}

#[inline(always)]
fn row_backward<T: Element, M: Element>(
    change: &[Vector<T>],
    grad_output: &[Vector<T>],
    gate: &[Vector<M>],
    sums: &mut [Vector<f32>],
    into: &mut [Vector<T>],
) {
    let row = into.iter_mut().zip(change).zip(grad_output).zip(gate);
    for (sum, (((into, change), grad_output), gate)) in sums.iter_mut().zip(row) {
        for lane in 0..LANES {
            sum[lane] += grad_output[lane].widened() * change[lane].widened();
            into[lane] = T::rounded(grad_output[lane].widened() * gate[lane].widened());
        }
    }
}
