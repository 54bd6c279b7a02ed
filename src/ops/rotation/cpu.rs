//! Rotation in one pass over a CPU's memory.

use half::bf16;
use tch::{Kind, Tensor};

use super::Direction;
use crate::ops::lanes::vectorized;
use crate::tensor::{Element, elements, elements_mut};

/// Numbers of a token and of one of its heads.
#[derive(Clone, Copy)]
struct Widths {
    token: usize,
    head: usize,
}

/// # Shapes
/// `x`: `[B, L, N, E]`; `table`: `[L, 1, E/2]` complex. Returns the shape of `x`.
pub fn turned(x: &Tensor, table: &Tensor, direction: Direction) -> Tensor {
    let (_, _, heads, width) = x.size4().expect("[B, L, N, E]");
    let widths = Widths { token: (heads * width) as usize, head: width as usize };
    let sign = direction.sign();
    let mut output = x.empty_like();
    let (table, into) = (table.view_as_real(), &mut output);
    let table = elements(&table);
    match x.kind() {
        Kind::BFloat16 => turn::<bf16>(elements(x), table, widths, sign, elements_mut(into)),
        _ => turn::<f32>(elements(x), table, widths, sign, elements_mut(into)),
    }
    output
}

vectorized! {
    fn turn<T>(x: &[T], table: &[f32], widths: Widths, sign: f32, into: &mut [T]) = turn_loop;
}

/// `table`: cosine and sine of each token and pair; `sign`: of the angles.
#[inline(always)]
fn turn_loop<T: Element>(x: &[T], table: &[f32], widths: Widths, sign: f32, into: &mut [T]) {
    let Widths { token, head } = widths;
    let tokens = into.chunks_exact_mut(token).zip(x.chunks_exact(token));
    for ((into, x), angles) in tokens.zip(table.chunks_exact(head).cycle()) {
        for (into, x) in into.chunks_exact_mut(head).zip(x.chunks_exact(head)) {
            turn_head(x, angles, sign, into);
        }
    }
}

#[inline(always)]
fn turn_head<T: Element>(x: &[T], angles: &[f32], sign: f32, into: &mut [T]) {
    let pairs = into.as_chunks_mut::<2>().0.iter_mut().zip(x.as_chunks::<2>().0);
    for ((into, x), angle) in pairs.zip(angles.as_chunks::<2>().0) {
        let [first, second] = x.map(T::widened);
        let [cosine, sine] = [angle[0], sign * angle[1]];
        *into = [first * cosine - second * sine, first * sine + second * cosine].map(T::rounded);
    }
}
