//! Root-mean-square normalization over the last axis with a learned scale.

use half::bf16;
use tch::{Kind, Tensor};

use super::fits;
use super::vectors::{LANES, Sums, vectors, vectors_mut};
use crate::autograd::by_hand;
use crate::tensor::{Element, elements, elements_mut};

/// `x / sqrt(mean(x²) + epsilon) · weight`, rounded once, or before the scale as well.
///
/// # Shapes
/// `x`: `[…, D]`; `weight`: `[D]`. Returns the shape and kind of `x`, none where libtorch's
/// operators are to do it.
pub fn rms_norm(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
    rounds_before_scale: bool,
) -> Option<Tensor> {
    let width = weight.numel();
    if !fits(x) || weight.kind() != x.kind() || !width.is_multiple_of(LANES) {
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
        values::<T>(
            vectors(elements(&x)),
            vectors(elements(&weight)),
            settings,
            vectors_mut(elements_mut(&mut output)),
        );
        (output, (x, weight))
    };
    by_hand(&[x, weight], forward, move |(x, weight), grad_output| {
        let (mut grad_x, grad_output) = (x.empty_like(), grad_output.contiguous());
        let read = [&x, &grad_output].map(|tensor| vectors(elements::<T>(tensor)));
        let grad_weight = gradients(
            read,
            vectors(elements(&weight)),
            settings,
            vectors_mut(elements_mut(&mut grad_x)),
        );
        vec![grad_x, Tensor::from_slice(&grad_weight).to_kind(T::KIND)]
    })
}

vectorized! {
    fn values<T: Element>(x: &[[T; LANES]], weight: &[[T; LANES]], settings: Settings, into: &mut [[T; LANES]]) {
        for (into, x) in into.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
            let inverse = inverse(x, settings.epsilon);
            for ((into, x), weight) in into.iter_mut().zip(x).zip(weight) {
                for lane in 0..LANES {
                    let normalized = x[lane].widened() * inverse;
                    let normalized = if settings.rounds_before_scale { T::rounded(normalized).widened() } else { normalized };
                    into[lane] = T::rounded(normalized * weight[lane].widened());
                }
            }
        }
    }
}

/// 1 / sqrt(mean(x²) + epsilon).
#[inline(always)]
fn inverse<T: Element>(x: &[[T; LANES]], epsilon: f32) -> f32 {
    let mut sums = [0f32; LANES];
    for vector in x {
        for (sum, x) in sums.iter_mut().zip(vector) {
            *sum += x.widened() * x.widened();
        }
    }
    1.0 / (sums.iter().sum::<f32>() / (x.len() * LANES) as f32 + epsilon).sqrt()
}

vectorized! {
    /// Gradient of `x`, into its place, and of the weight. With n = x · inverse and g the gradient
    /// of n they are inverse · (g − n · mean(g · n)) and the sum of grad_output · n.
    fn gradients<T: Element>(
        [x, grad_output]: [&[[T; LANES]]; 2],
        weight: &[[T; LANES]],
        settings: Settings,
        into: &mut [[T; LANES]],
    ) -> Vec<f64> {
        let width = weight.len();
        let mut grad_weight = Sums::new(width);
        for ((into, x), grad_output) in into.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad_output.chunks_exact(width)) {
            let inverse = inverse(x, settings.epsilon);
            let mut products = [0f32; LANES];
            for (((sum, x), grad_output), weight) in grad_weight.row().iter_mut().zip(x).zip(grad_output).zip(weight) {
                for lane in 0..LANES {
                    let product = grad_output[lane].widened() * x[lane].widened() * inverse;
                    sum[lane] += product;
                    products[lane] += product * weight[lane].widened();
                }
            }
            let mean = products.iter().sum::<f32>() / (width * LANES) as f32;
            for (((into, x), grad_output), weight) in into.iter_mut().zip(x).zip(grad_output).zip(weight) {
                for lane in 0..LANES {
                    let normalized = x[lane].widened() * inverse;
                    into[lane] = T::rounded(inverse * (grad_output[lane].widened() * weight[lane].widened() - normalized * mean));
                }
            }
        }
        grad_weight.taken()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;

    #[test]
    fn it_is_libtorchs() {
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 8e-3)] {
            for (rows, width) in [(70, 64), (3, 48), (33, 512)] {
                let (x, weight) = (draw(&[2, rows, width], kind, 1) * 3.0, draw(&[width], kind, 2));
                let plain = |inputs: &[Tensor]| inputs[0].rms_norm([width], Some(&inputs[1]), 1e-6);
                for before in [false, true] {
                    let by_hand = |inputs: &[Tensor]| {
                        rms_norm(&inputs[0], &inputs[1], 1e-6, before).expect("it fits")
                    };
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
