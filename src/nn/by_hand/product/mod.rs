//! Products of matrices, where libtorch's are not the best.
//!
//! On a core of an AMD EPYC 9004 libtorch's reach 94 GFLOP/s in f32 and 205 in bfloat16, and those
//! of its attention in bfloat16 are emulated; these reach 110 and 219 of the 115 and 231 that the
//! instructions allow.

mod kernel;
mod layout;
mod operands;

use half::bf16;
use tch::{Kind, Tensor};

pub(super) use kernel::{Destination, Number, Onto, Scale, multiply, runs_here};
pub(super) use operands::{Left, Panels, Rows, Strips};

use super::fits;
use crate::autograd::by_hand;
use crate::libtorch;
use crate::tensor::{elements, elements_mut};

/// Rows from which on a product is worth more than what is around it.
const FEWEST_ROWS: i64 = 16;

/// Whether products are computed here, rather than by libtorch.
pub(super) fn is_ours() -> bool {
    !libtorch::knows_this_cpu() && runs_here()
}

/// `x · weightᵀ + bias`.
///
/// # Shapes
/// `x`: `[…, inputs]`; `weight`: `[outputs, inputs]`; `bias`: `[outputs]`. Returns `[…, outputs]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (outputs, inputs) = weight.size2().expect("[outputs, inputs]");
    let rows = x.numel() as i64 / inputs;
    let fit = [Some(x), Some(weight), bias]
        .into_iter()
        .flatten()
        .all(|tensor| fits(tensor) && tensor.kind() == x.kind());
    // A row of whole units needs no copy: of bfloat16 two are multiplied at once.
    if !fit || !is_ours() || rows < FEWEST_ROWS || outputs % 2 + inputs % 2 > 0 {
        return x.linear(weight, bias);
    }
    of_kind(x, weight, bias)
}

fn of_kind(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    match x.kind() {
        Kind::BFloat16 => multiplied::<bf16>(x, weight, bias),
        _ => multiplied::<f32>(x, weight, bias),
    }
}

fn multiplied<T: Number>(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let needs =
        [x.requires_grad(), weight.requires_grad(), bias.is_some_and(Tensor::requires_grad)];
    let forward = || {
        let (x, weight) = (x.detach().contiguous(), weight.detach().contiguous());
        (forward::<T>(&x, &weight, bias), (x, weight))
    };
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let num_operands = operands.len();
    by_hand(&operands, forward, move |(x, weight), grad_output| {
        let mut gradients = backward::<T>(&x, &weight, &grad_output.contiguous(), needs);
        gradients.truncate(num_operands);
        gradients
    })
}

fn forward<T: Number>(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (outputs, inputs) = sizes(weight);
    let shape: Vec<i64> =
        x.size().iter().copied().take(x.dim() - 1).chain([outputs as i64]).collect();
    let mut output = Tensor::empty(shape, (T::KIND, x.device()));
    let bias = bias.map(|bias| bias.detach().contiguous());
    let bias: Option<&[T]> = bias.as_ref().map(elements);
    let (x, weight) =
        (Rows::<T>::dense(elements(x), inputs), Rows::<T>::dense(elements(weight), inputs));
    by_panels(Left::Rows(x), outputs, elements_mut(&mut output), bias, |panel, first, columns| {
        panel.transposed(weight.part(first, columns));
    });
    output
}

/// Gradients of `x`, weight and bias, as far as they are needed.
fn backward<T: Number>(
    x: &Tensor,
    weight: &Tensor,
    grad_output: &Tensor,
    needs: [bool; 3],
) -> Vec<Tensor> {
    let (outputs, inputs) = sizes(weight);
    let gradient = Rows::<T>::dense(elements(grad_output), outputs);
    let product = |like: &Tensor, left: Left<'_, T>, right: &Tensor| {
        let (mut product, right) = (like.empty_like(), Rows::<T>::dense(elements(right), inputs));
        by_panels(left, inputs, elements_mut(&mut product), None, |panel, first, columns| {
            panel.straight(right.side(first, columns))
        });
        product
    };
    let mut gradients = [Tensor::new(), Tensor::new(), Tensor::new()];
    if needs[0] {
        gradients[0] = product(x, Left::Rows(gradient), weight);
    }
    if needs[1] || needs[2] {
        let mut strips = Strips::default();
        let sums = strips.transposed_and_summed(gradient);
        if needs[1] {
            gradients[1] = product(weight, Left::Strips(&strips), x);
        }
        gradients[2] = Tensor::from_slice(&sums).to_kind(T::KIND);
    }
    gradients.into()
}

/// Outputs and inputs of a weight.
fn sizes(weight: &Tensor) -> (usize, usize) {
    let (outputs, inputs) = weight.size2().expect("[outputs, inputs]");
    (outputs as usize, inputs as usize)
}

/// A product whose right operand is laid out panel by panel, `lay_out(panel, first column,
/// columns)`: one is in the cache at a time, and no copy of the whole operand is held.
fn by_panels<T: Number>(
    left: Left<'_, T>,
    columns: usize,
    product: &mut [T],
    bias: Option<&[T]>,
    lay_out: impl Fn(&mut Panels, usize, usize),
) {
    let mut panel = Panels::new();
    for first in (0..columns).step_by(operands::COLUMNS) {
        let width = operands::COLUMNS.min(columns - first);
        lay_out(&mut panel, first, width);
        let onto = bias.map_or(Onto::Nothing, |bias| Onto::Bias(&bias[first..][..width]));
        multiply(
            left,
            &panel,
            &mut Destination {
                elements: &mut product[first..],
                stride: columns,
                scale: Scale::All(1.0),
                onto,
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;

    #[test]
    fn products_are_libtorchs() {
        if !runs_here() {
            return eprintln!("SKIPPED: this processor has no bfloat16 products of 512 bits");
        }
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 1e-2)] {
            for (rows, inputs, outputs) in [(30, 40, 50), (11, 130, 34), (1, 2, 2), (8, 64, 32)] {
                let inputs = [
                    draw(&[3, rows, inputs], kind, 1),
                    draw(&[outputs, inputs], kind, 2),
                    draw(&[outputs], kind, 3),
                ];
                let by_hand = |inputs: &[Tensor]| of_kind(&inputs[0], &inputs[1], inputs.get(2));
                let plain = |inputs: &[Tensor]| inputs[0].linear(&inputs[1], inputs.get(2));
                agree(&inputs[..2], tolerance, by_hand, plain);
                agree(&inputs, tolerance, by_hand, plain);
            }
        }
    }

    #[test]
    fn a_product_is_scaled_and_added() {
        if !runs_here() {
            return eprintln!("SKIPPED: this processor has no bfloat16 products of 512 bits");
        }
        let (a, b) = ([1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [1f32, 0.0, 2.0, 0.0, 1.0, 2.0]);
        let mut panels = Panels::new();
        panels.transposed(Rows::dense(&b, 3));
        let product = |scale, onto| {
            let mut sum = [100f32; 4];
            multiply(
                Left::Rows(Rows::dense(&a, 3)),
                &panels,
                &mut Destination { elements: &mut sum, stride: 2, scale, onto },
            );
            sum
        };
        assert_eq!(product(Scale::All(10.0), Onto::Itself), [170.0, 180.0, 260.0, 270.0]);
        assert_eq!(
            product(Scale::Rows(&[1.0, 10.0]), Onto::Bias(&[1.0, 2.0])),
            [8.0, 10.0, 161.0, 172.0]
        );
        assert_eq!(product(Scale::All(1.0), Onto::Nothing), [7.0, 8.0, 16.0, 17.0]);
    }
}
