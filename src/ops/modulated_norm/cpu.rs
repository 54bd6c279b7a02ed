//! Modulated layer normalization and its gradient in one pass over a CPU's memory.
//!
//! `T` is the kind of the tokens, `M` that of the modulation and of every intermediate number.

use half::bf16;
use tch::{Kind, Tensor};

use super::{ModulatedNorm, Normalized, Saved};
use crate::ops::lanes::{LANES, Sums, Vector, vectorized, vectors, vectors_mut};
use crate::ops::modulation::{gradient, vectors_of_row};
use crate::tensor::{Element, elements, elements_mut};

/// Vectors of a modulation, `width` of them a row.
#[derive(Clone, Copy)]
struct Modulation<'m, M> {
    factor: &'m [Vector<M>],
    shift: &'m [Vector<M>],
    width: usize,
}

/// Mean of a row, and one over the root of its variance and epsilon.
type Moments = [f32; 2];

/// Gradients of a modulation, row by row.
struct ModulationGradients {
    factor: Vec<f64>,
    shift: Vec<f64>,
}

pub fn forward(norm: ModulatedNorm, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Normalized {
    let (epsilon, factor) = (norm.epsilon as f32, &norm.factor(scale));
    match (x.kind(), factor.kind()) {
        (Kind::BFloat16, Kind::BFloat16) => forward_in::<bf16, bf16>(epsilon, x, factor, shift),
        (Kind::BFloat16, _) => forward_in::<bf16, f32>(epsilon, x, factor, shift),
        _ => forward_in::<f32, f32>(epsilon, x, factor, shift),
    }
}

fn forward_in<T: Element, M: Element>(
    epsilon: f32,
    x: &Tensor,
    factor: &Tensor,
    shift: &Tensor,
) -> Normalized {
    let width = vectors_of_row(x);
    let mut output = x.empty_like();
    let rows = (x.numel() / (width * LANES)) as i64;
    let mut moments = Tensor::empty([rows, 2], (Kind::Float, x.device()));
    let modulation = Modulation::<M> {
        factor: vectors(elements(factor)),
        shift: vectors(elements(shift)),
        width,
    };
    normalize::<T, M>(
        vectors(elements(x)),
        modulation,
        epsilon,
        vectors_mut(elements_mut(&mut output)),
        elements_mut(&mut moments).as_chunks_mut().0,
    );
    Normalized { output, moments }
}

pub fn backward(norm: ModulatedNorm, saved: &Saved, grad_output: &Tensor) -> [Tensor; 3] {
    let Saved { x, scale, moments } = saved;
    let factor = &norm.factor(scale);
    match (x.kind(), factor.kind()) {
        (Kind::BFloat16, Kind::BFloat16) => {
            backward_in::<bf16, bf16>(x, factor, moments, grad_output)
        }
        (Kind::BFloat16, _) => backward_in::<bf16, f32>(x, factor, moments, grad_output),
        _ => backward_in::<f32, f32>(x, factor, moments, grad_output),
    }
}

fn backward_in<T: Element, M: Element>(
    x: &Tensor,
    factor: &Tensor,
    moments: &Tensor,
    grad_output: &Tensor,
) -> [Tensor; 3] {
    let mut grad_x = x.empty_like();
    let gradients = normalize_backward::<T, M>(
        vectors(elements(x)),
        vectors(elements(grad_output)),
        vectors(elements(factor)),
        elements(moments).as_chunks().0,
        vectors_of_row(x),
        vectors_mut(elements_mut(&mut grad_x)),
    );
    let shape = factor.size();
    let [factor, shift] =
        [gradients.factor, gradients.shift].map(|sums| gradient::<M>(&sums, &shape));
    [grad_x, factor, shift]
}

#[inline(always)]
fn moments<T: Element>(row: &[Vector<T>], epsilon: f32) -> Moments {
    let count = (row.len() * LANES) as f32;
    let mut sums = [0f32; LANES];
    for vector in row {
        sums.iter_mut().zip(vector).for_each(|(sum, x)| *sum += x.widened());
    }
    let mean = sums.iter().sum::<f32>() / count;
    let mut sums = [0f32; LANES];
    for vector in row {
        for (sum, x) in sums.iter_mut().zip(vector) {
            let difference = x.widened() - mean;
            *sum += difference * difference;
        }
    }
    let variance = sums.iter().sum::<f32>() / count;
    [mean, 1.0 / (variance + epsilon).sqrt()]
}

vectorized! {
    fn normalize<T, M>(
        x: &[Vector<T>], modulation: Modulation<'_, M>, epsilon: f32, into: &mut [Vector<T>],
        into_moments: &mut [Moments],
    ) = normalize_loop;
}

#[inline(always)]
fn normalize_loop<T: Element, M: Element>(
    x: &[Vector<T>],
    modulation: Modulation<'_, M>,
    epsilon: f32,
    into: &mut [Vector<T>],
    into_moments: &mut [Moments],
) {
    let Modulation { factor, shift, width } = modulation;
    // Vectors of the tokens that share a row of the modulation.
    let sharing = x.len() / (factor.len() / width);
    let mut into_moments = into_moments.iter_mut();
    let samples = into.chunks_exact_mut(sharing).zip(x.chunks_exact(sharing));
    let rows = factor.chunks_exact(width).zip(shift.chunks_exact(width));
    for ((into, x), (factor, shift)) in samples.zip(rows) {
        let rows = into.chunks_exact_mut(width).zip(x.chunks_exact(width));
        for ((into, x), into_moments) in rows.zip(&mut into_moments) {
            *into_moments = moments(x, epsilon);
            normalize_row(x, factor, shift, *into_moments, into);
        }
    }
}

#[inline(always)]
fn normalize_row<T: Element, M: Element>(
    x: &[Vector<T>],
    factor: &[Vector<M>],
    shift: &[Vector<M>],
    [mean, inverse]: Moments,
    into: &mut [Vector<T>],
) {
    for (((into, x), factor), shift) in into.iter_mut().zip(x).zip(factor).zip(shift) {
        for lane in 0..LANES {
            let normalized = M::rounded((x[lane].widened() - mean) * inverse).widened();
            let scaled = M::rounded(normalized * factor[lane].widened()).widened();
            into[lane] = T::rounded(M::rounded(scaled + shift[lane].widened()).widened());
        }
    }
}

vectorized! {
    fn normalize_backward<T, M>(
        x: &[Vector<T>], grad_output: &[Vector<T>], factor: &[Vector<M>], moments: &[Moments],
        width: usize, into: &mut [Vector<T>],
    ) -> ModulationGradients = normalize_backward_loop;
}

/// Computes the gradient of `x` into its place and returns those of factor and shift. With g the
/// gradient of n it is inverse · (g − mean(g) − n · mean(g · n)); theirs are the sums of
/// grad_output · n and of grad_output.
#[inline(always)]
fn normalize_backward_loop<T: Element, M: Element>(
    x: &[Vector<T>],
    grad_output: &[Vector<T>],
    factor: &[Vector<M>],
    moments: &[Moments],
    width: usize,
    into: &mut [Vector<T>],
) -> ModulationGradients {
    let sharing = x.len() / (factor.len() / width);
    let mut gradients = ModulationGradients { factor: Vec::new(), shift: Vec::new() };
    let samples = into.chunks_exact_mut(sharing).zip(x.chunks_exact(sharing));
    let samples = samples.zip(grad_output.chunks_exact(sharing));
    let samples = samples.zip(moments.chunks_exact(sharing / width));
    for ((((into, x), grad_output), moments), factor) in samples.zip(factor.chunks_exact(width)) {
        let (mut of_factor, mut of_shift) = (Sums::new(width), Sums::new(width));
        let rows = into.chunks_exact_mut(width).zip(x.chunks_exact(width));
        let rows = rows.zip(grad_output.chunks_exact(width)).zip(moments);
        for (((into, x), grad_output), moments) in rows {
            let sums = RowSums { factor: of_factor.row(), shift: of_shift.row() };
            row_backward(x, grad_output, factor, *moments, sums, into);
        }
        gradients.factor.extend(of_factor.taken());
        gradients.shift.extend(of_shift.taken());
    }
    gradients
}

/// Sums to which a row adds its part of the modulation's gradients.
struct RowSums<'s> {
    factor: &'s mut [Vector<f32>],
    shift: &'s mut [Vector<f32>],
}

#[inline(always)]
fn row_backward<T: Element, M: Element>(
    x: &[Vector<T>],
    grad_output: &[Vector<T>],
    factor: &[Vector<M>],
    [mean, inverse]: Moments,
    sums: RowSums<'_>,
    into: &mut [Vector<T>],
) {
    let count = (x.len() * LANES) as f32;
    let (mut gradients, mut products) = ([0f32; LANES], [0f32; LANES]);
    let sums = sums.factor.iter_mut().zip(sums.shift);
    for ((((of_factor, of_shift), x), grad_output), factor) in
        sums.zip(x).zip(grad_output).zip(factor)
    {
        for lane in 0..LANES {
            let normalized = (x[lane].widened() - mean) * inverse;
            let grad_output = grad_output[lane].widened();
            let gradient = grad_output * factor[lane].widened();
            of_factor[lane] += grad_output * normalized;
            of_shift[lane] += grad_output;
            gradients[lane] += gradient;
            products[lane] += gradient * normalized;
        }
    }
    let [gradient_mean, product_mean] =
        [gradients, products].map(|sums| sums.iter().sum::<f32>() / count);
    for (((into, x), grad_output), factor) in into.iter_mut().zip(x).zip(grad_output).zip(factor) {
        for lane in 0..LANES {
            let normalized = (x[lane].widened() - mean) * inverse;
            let gradient = grad_output[lane].widened() * factor[lane].widened();
            into[lane] =
                T::rounded(inverse * (gradient - gradient_mean - normalized * product_mean));
        }
    }
}
