//! GELU's approximation by tanh.

use half::bf16;
use tch::{Kind, Tensor};

use super::exp::exp;
use super::fits;
use crate::autograd::by_hand;
use crate::tensor::{Element, elements, elements_mut};

/// 2 · sqrt(2/π), and the factor of the cube.
const SCALE: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

/// `x · (1 + tanh(sqrt(2/π) · (x + 0.044715 · x³))) / 2`; libtorch's operator takes most of its
/// time for the tanh, and again in its gradient.
///
/// # Shapes
/// Any.
///
/// Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
pub fn gelu_tanh(x: &Tensor) -> Tensor {
    if !fits(x) {
        return x.gelu("tanh");
    }
    match x.kind() {
        Kind::BFloat16 => of::<bf16>(x),
        _ => of::<f32>(x),
    }
}

fn of<T: Element>(x: &Tensor) -> Tensor {
    let forward = || {
        let x = x.detach().contiguous();
        let mut output = x.empty_like();
        values(elements::<T>(&x), elements_mut(&mut output));
        (output, x)
    };
    by_hand(&[x], forward, |x, grad_output| {
        let mut gradient = x.empty_like();
        gradients(
            elements::<T>(&x),
            elements(&grad_output.contiguous()),
            elements_mut(&mut gradient),
        );
        vec![gradient]
    })
}

vectorized! {
    fn values<T: Element>(x: &[T], into: &mut [T]) {
        for (into, x) in into.iter_mut().zip(x) {
            let x = x.widened();
            *into = T::rounded(x * halves(x).0);
        }
    }
}

vectorized! {
    fn gradients<T: Element>(x: &[T], grad_output: &[T], into: &mut [T]) {
        for ((into, x), grad_output) in into.iter_mut().zip(x).zip(grad_output) {
            *into = T::rounded(grad_output.widened() * slope(x.widened()));
        }
    }
}

/// (1 + tanh(u/2)) / 2 = 1 / (1 + exp(−u)), and what it lacks of 1.
#[inline(always)]
fn halves(x: f32) -> (f32, f32) {
    let power = exp(-SCALE * x * (CUBE * x).mul_add(x, 1.0));
    let half = 1.0 / (1.0 + power);
    (half, power * half)
}

#[inline(always)]
fn slope(x: f32) -> f32 {
    let (half, rest) = halves(x);
    let inner = SCALE * (3.0 * CUBE * x).mul_add(x, 1.0);
    (x * half * rest).mul_add(inner, half)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;

    #[test]
    fn it_is_libtorchs() {
        for (kind, tolerance) in [(Kind::Float, 3e-7), (Kind::BFloat16, 4e-3)] {
            let x = draw(&[3, 101], kind, 1) * 4.0;
            agree(&[x], tolerance, |inputs| gelu_tanh(&inputs[0]), |inputs| inputs[0].gelu("tanh"));
        }
    }

    #[test]
    fn far_out_it_is_zero_and_the_identity() {
        tch::set_num_threads(1);
        let x = Tensor::from_slice(&[-1e30f32, -100.0, 100.0, 1e30]);
        assert_eq!(elements::<f32>(&gelu_tanh(&x))[2..], [100.0, 1e30]);
        assert!(
            elements::<f32>(&gelu_tanh(&x))[..2].iter().all(|y| y.abs() < 1e-6),
            "{:?}",
            elements::<f32>(&gelu_tanh(&x))
        );
    }
}
