//! Root-mean-square normalization over the last axis with a learned scale.

use half::bf16;
use tch::{Kind, Tensor};

use super::fits;
use crate::autograd::by_hand;
use crate::tensor::{Element, elements, elements_mut};

/// `x / sqrt(mean(x²) + epsilon) · weight`, rounded once, or before the scale as well.
///
/// # Shapes
/// `x`: `[…, D]`; `weight`: `[D]`. Returns the shape and kind of `x`, none where libtorch's operators are to do it.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64, rounds_before_scale: bool) -> Option<Tensor> {
    if !fits(x) || weight.kind() != x.kind() {
        return None;
    }
    let settings = Settings { epsilon: epsilon as f32, rounds_before_scale };
    let of_kind = match x.kind() {
        Kind::BFloat16 => of::<bf16>,
        _ => of::<f32>,
    };
    Some(of_kind(x, weight, settings))
}

#[derive(Clone, Copy)]
struct Settings {
    epsilon: f32,
    rounds_before_scale: bool,
}

fn of<T: Element>(x: &Tensor, weight: &Tensor, settings: Settings) -> Tensor {
    let forward = || {
        let (x, weight) = (x.detach().contiguous(), weight.detach().contiguous());
        let mut output = x.empty_like();
        values(elements::<T>(&x), elements(&weight), settings, elements_mut(&mut output));
        (output, (x, weight))
    };
    by_hand(&[x, weight], forward, move |(x, weight), grad_output| {
        let mut grad_x = x.empty_like();
        let grad_output = grad_output.contiguous();
        let grad_weight = gradients(elements::<T>(&x), elements(&weight), elements(&grad_output), settings, elements_mut(&mut grad_x));
        vec![grad_x, Tensor::from_slice(&grad_weight).to_kind(T::KIND)]
    })
}

vectorized! {
    fn values<T: Element>(x: &[T], weight: &[T], settings: Settings, into: &mut [T]) {
        for (into, x) in into.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
            let inverse = inverse(x, settings.epsilon);
            for ((into, x), weight) in into.iter_mut().zip(x).zip(weight) {
                let normalized = x.widened() * inverse;
                let normalized = if settings.rounds_before_scale { T::rounded(normalized).widened() } else { normalized };
                *into = T::rounded(normalized * weight.widened());
            }
        }
    }
}

/// 1 / sqrt(mean(x²) + epsilon).
#[inline(always)]
fn inverse<T: Element>(x: &[T], epsilon: f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (vectors, rest) = x.as_chunks::<LANES>();
    for vector in vectors {
        for (sum, x) in sums.iter_mut().zip(vector) {
            *sum += x.widened() * x.widened();
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += x.widened() * x.widened();
    }
    1.0 / (sums.iter().sum::<f32>() / x.len() as f32 + epsilon).sqrt()
}

vectorized! {
    /// Gradient of `x`, into its place, and of the weight. With n = x · inverse and g the gradient of n they are
    /// inverse · (g − n · mean(g · n)) and the sum of grad_output · n.
    fn gradients<T: Element>(x: &[T], weight: &[T], grad_output: &[T], settings: Settings, into: &mut [T]) -> Vec<f64> {
        let width = weight.len();
        let weight: Vec<f32> = weight.iter().map(|weight| weight.widened()).collect();
        // A block of rows is summed in f32, the blocks in f64: many small numbers are not lost against a large sum.
        let (mut grad_weight, mut of_block) = (vec![0f64; width], vec![0f32; width]);
        let block = ROWS * width;
        for ((into, x), grad_output) in into.chunks_mut(block).zip(x.chunks(block)).zip(grad_output.chunks(block)) {
            of_block.fill(0.0);
            for ((into, x), grad_output) in into.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad_output.chunks_exact(width)) {
                of_row(into, x, grad_output, &weight, &mut of_block, settings.epsilon);
            }
            grad_weight.iter_mut().zip(&of_block).for_each(|(sum, of_block)| *sum += f64::from(*of_block));
        }
        grad_weight
    }
}

/// Rows of a block.
const ROWS: usize = 32;

#[inline(always)]
fn of_row<T: Element>(into: &mut [T], x: &[T], grad_output: &[T], weight: &[f32], grad_weight: &mut [f32], epsilon: f32) {
    let inverse = inverse(x, epsilon);
    let length = weight.len();
    let (into, x, grad_output, grad_weight) = (&mut into[..length], &x[..length], &grad_output[..length], &mut grad_weight[..length]);
    let mut products = [0f32; LANES];
    for index in 0..length {
        let product = grad_output[index].widened() * x[index].widened() * inverse;
        grad_weight[index] += product;
        products[index % LANES] += product * weight[index];
    }
    let mean = products.iter().sum::<f32>() / length as f32;
    for index in 0..length {
        let normalized = x[index].widened() * inverse;
        into[index] = T::rounded(inverse * (grad_output[index].widened() * weight[index] - normalized * mean));
    }
}

/// Partial sums of a row, as many as a vector has: a sum in order would wait for each addition.
const LANES: usize = 16;

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;

    #[test]
    fn it_is_libtorchs() {
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 8e-3)] {
            for (rows, width) in [(70, 64), (3, 20), (33, 512)] {
                let (x, weight) = (draw(&[2, rows, width], kind, 1) * 3.0, draw(&[width], kind, 2));
                let plain = |inputs: &[Tensor]| inputs[0].rms_norm([width], Some(&inputs[1]), 1e-6);
                for before in [false, true] {
                    let by_hand = |inputs: &[Tensor]| rms_norm(&inputs[0], &inputs[1], 1e-6, before).expect("it fits");
                    agree(&[x.shallow_clone(), weight.shallow_clone()], tolerance, by_hand, plain);
                }
            }
        }
    }

    #[test]
    fn both_roundings_are_libtorchs() {
        tch::set_num_threads(1);
        let (x, weight) = (draw(&[50, 64], Kind::BFloat16, 1), draw(&[64], Kind::BFloat16, 2));
        let apart = x.rms_norm([64], None::<&Tensor>, 1e-6) * &weight;
        let once = x.rms_norm([64], Some(&weight), 1e-6);
        for (before, expected) in [(true, apart), (false, once)] {
            let found = rms_norm(&x, &weight, 1e-6, before).expect("it fits");
            // A sum in another order may round a number in a thousand to its neighbour.
            let different = found.ne_tensor(&expected).sum(Kind::Int64).int64_value(&[]);
            assert!(different <= 3, "{different} of 3200 numbers differ");
        }
    }
}
