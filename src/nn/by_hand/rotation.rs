//! Rotation of neighbouring features, as pairs.

use half::bf16;
use tch::{Kind, Tensor};

use super::fits;
use crate::autograd::by_hand;
use crate::tensor::{Element, elements, elements_mut};

/// Each pair turned by its angle; computed in f32, rounded once. The gradient is turned back.
///
/// # Shapes
/// `x`: `[B, L, N, E]`; `table`: `[L, 1, E/2]` of complex f32. Returns the shape and kind of `x`,
/// none where libtorch's operators are to do it.
pub fn rotate(x: &Tensor, table: &Tensor) -> Option<Tensor> {
    if !fits(x) {
        return None;
    }
    Some(match x.kind() {
        Kind::BFloat16 => of::<bf16>(x, table),
        _ => of::<f32>(x, table),
    })
}

fn of<T: Element>(x: &Tensor, table: &Tensor) -> Tensor {
    let (_, _, heads, width) = x.size4().expect("[B, L, N, E]");
    let turned = move |x: &Tensor, table: &Tensor, direction: f32| {
        let mut output = x.empty_like();
        turn::<T>(
            elements(x),
            elements(table),
            (heads as usize, width as usize),
            direction,
            elements_mut(&mut output),
        );
        output
    };
    let forward = || {
        let table = table.view_as_real().contiguous();
        (turned(&x.detach().contiguous(), &table, 1.0), table)
    };
    by_hand(&[x], forward, move |table, grad_output| {
        vec![turned(&grad_output.contiguous(), &table, -1.0)]
    })
}

vectorized! {
    /// `table`: cosine and sine of each token and pair.
    fn turn<T: Element>(x: &[T], table: &[f32], (heads, width): (usize, usize), direction: f32, into: &mut [T]) {
        let tokens = into.chunks_exact_mut(heads * width).zip(x.chunks_exact(heads * width));
        for ((into, x), angles) in tokens.zip(table.chunks_exact(width).cycle()) {
            for (into, x) in into.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                for ((into, x), angle) in into.as_chunks_mut::<2>().0.iter_mut().zip(x.as_chunks::<2>().0).zip(angles.as_chunks::<2>().0) {
                    let ([first, second], [cosine, sine]) = (x.map(T::widened), [angle[0], direction * angle[1]]);
                    *into = [first * cosine - second * sine, first * sine + second * cosine].map(T::rounded);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;

    #[test]
    fn it_is_a_product_of_complex_numbers() {
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 4e-3)] {
            for width in [2, 24, 64] {
                let angles = draw(&[5, 1, width / 2], Kind::Float, 2);
                let table = Tensor::complex(&angles.cos(), &angles.sin());
                let plain = |inputs: &[Tensor]| {
                    let pairs = inputs[0].reshape([2, 5, 3, width / 2, 2]).view_as_complex();
                    (pairs * &table).view_as_real().flatten(3, 4)
                };
                agree(
                    &[draw(&[2, 5, 3, width], kind, 1)],
                    tolerance,
                    |inputs| rotate(&inputs[0], &table).expect("it fits"),
                    plain,
                );
            }
        }
    }
}
