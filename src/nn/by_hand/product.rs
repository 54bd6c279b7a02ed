//! Products of matrices in f32, where libtorch has no good kernels for them.
//!
//! On an AMD EPYC 9004 libtorch's reach 94 GFLOP/s a core, these 106.

use tch::{Kind, Tensor};

use super::fits;
use crate::autograd::by_hand;
use crate::libtorch;
use crate::tensor::{elements, elements_mut};

/// Rows from which on a product is worth more than what is around it.
const FEWEST_ROWS: i64 = 16;

/// `x · weightᵀ + bias`.
///
/// # Shapes
/// `x`: `[…, inputs]`; `weight`: `[outputs, inputs]`; `bias`: `[outputs]`. Returns `[…, outputs]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let inputs = weight.size()[1];
    let rows = x.numel() as i64 / inputs;
    let is_plain = [Some(x), Some(weight), bias].into_iter().flatten().all(|tensor| tensor.kind() == Kind::Float && fits(tensor));
    if !is_plain || libtorch::knows_this_cpu() || rows < FEWEST_ROWS {
        return x.linear(weight, bias);
    }
    multiplied(x, weight, bias)
}

fn multiplied(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let needs = [x.requires_grad(), weight.requires_grad(), bias.is_some_and(Tensor::requires_grad)];
    let forward = || {
        let (x, weight) = (x.detach().contiguous(), weight.detach().contiguous());
        (forward(&x, &weight, bias), (x, weight))
    };
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let num_operands = operands.len();
    by_hand(&operands, forward, move |(x, weight), grad_output| {
        let mut gradients = backward(&x, &weight, &grad_output.contiguous(), needs);
        gradients.truncate(num_operands);
        gradients
    })
}

fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (outputs, inputs) = weight.size2().expect("[outputs, inputs]");
    let shape: Vec<i64> = x.size().iter().copied().take(x.dim() - 1).chain([outputs]).collect();
    let mut output = match bias {
        Some(bias) => bias.detach().expand(shape, false).contiguous(),
        None => Tensor::empty(shape, (Kind::Float, x.device())),
    };
    let (x, weight) = (Matrix::rows(elements(x), inputs), Matrix::rows(elements(weight), inputs));
    multiply(elements_mut(&mut output), x, weight.transposed(), 1.0, bias.is_some());
    output
}

/// Gradients of `x`, weight and bias, as far as they are needed.
fn backward(x: &Tensor, weight: &Tensor, grad_output: &Tensor, needs: [bool; 3]) -> Vec<Tensor> {
    let (outputs, inputs) = weight.size2().expect("[outputs, inputs]");
    let gradient = Matrix::rows(elements(grad_output), outputs);
    let product = |like: &Tensor, lhs: Matrix<'_>, rhs: Matrix<'_>| {
        let mut product = like.empty_like();
        multiply(elements_mut(&mut product), lhs, rhs, 1.0, false);
        product
    };
    let if_needed = |needed: bool, of: &dyn Fn() -> Tensor| if needed { of() } else { Tensor::new() };
    vec![
        if_needed(needs[0], &|| product(x, gradient, Matrix::rows(elements(weight), inputs))),
        if_needed(needs[1], &|| product(weight, gradient.transposed(), Matrix::rows(elements(x), inputs))),
        if_needed(needs[2], &|| grad_output.flatten(0, -2).sum_dim_intlist(0i64, false, Kind::Float)),
    ]
}

/// Elements of a matrix, row by row or column by column.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'e> {
    elements: &'e [f32],
    rows: usize,
    columns: usize,
    is_transposed: bool,
}

impl<'e> Matrix<'e> {
    /// Rows of `columns` elements.
    pub fn rows(elements: &'e [f32], columns: i64) -> Self {
        let columns = columns as usize;
        Matrix { elements, rows: elements.len() / columns, columns, is_transposed: false }
    }

    pub fn transposed(self) -> Self {
        Matrix { rows: self.columns, columns: self.rows, is_transposed: !self.is_transposed, ..self }
    }

    /// Elements from one row to the next, and from one column to the next.
    fn strides(&self) -> (isize, isize) {
        if self.is_transposed { (1, self.rows as isize) } else { (self.columns as isize, 1) }
    }
}

/// `scale · lhs · rhs`, row by row, into `product`, or onto what it holds.
///
/// # Panics
/// If the sizes do not fit each other (a bug in the caller).
#[allow(unsafe_code)]
pub(super) fn multiply(product: &mut [f32], lhs: Matrix<'_>, rhs: Matrix<'_>, scale: f32, adds: bool) {
    let (rows, columns, depth) = (lhs.rows, rhs.columns, lhs.columns);
    assert!(depth == rhs.rows && product.len() == rows * columns, "[{rows}, {depth}] times [{}, {columns}]", rhs.rows);
    assert!(lhs.elements.len() == rows * depth && rhs.elements.len() == depth * columns);
    let ((lhs_row, lhs_column), (rhs_row, rhs_column)) = (lhs.strides(), rhs.strides());
    // SAFETY: by the assertions each operand has an element at every row and column that its strides lead to.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            depth,
            product.as_mut_ptr(),
            1,
            columns as isize,
            adds,
            lhs.elements.as_ptr(),
            lhs_column,
            lhs_row,
            rhs.elements.as_ptr(),
            rhs_column,
            rhs_row,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;

    #[test]
    fn products_are_libtorchs() {
        let (x, weight, bias) = (draw(&[3, 30, 40], Kind::Float, 1), draw(&[50, 40], Kind::Float, 2), draw(&[50], Kind::Float, 3));
        let by_hand = |inputs: &[Tensor]| multiplied(&inputs[0], &inputs[1], inputs.get(2));
        let plain = |inputs: &[Tensor]| inputs[0].linear(&inputs[1], inputs.get(2));
        agree(&[x.shallow_clone(), weight.shallow_clone()], 1e-6, by_hand, plain);
        agree(&[x, weight, bias], 1e-6, by_hand, plain);
    }

    #[test]
    fn a_product_is_scaled_and_added() {
        let (a, b) = ([1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [1f32, 0.0, 2.0, 0.0, 1.0, 2.0]);
        let mut sum = [100f32; 4];
        multiply(&mut sum, Matrix::rows(&a, 3), Matrix::rows(&b, 3).transposed(), 10.0, true);
        assert_eq!(sum, [170.0, 180.0, 260.0, 270.0]);
    }
}
