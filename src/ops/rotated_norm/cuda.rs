//! Normalization and rotation by one kernel of a GPU, that of `rms_norm`.

use tch::Tensor;

use crate::ops::RmsNorm;
use crate::ops::rms_norm::Saved;
use crate::ops::rms_norm::cuda::{self, Turn};

pub fn forward(norm: RmsNorm, x: &Tensor, weight: &Tensor, table: &Tensor) -> Tensor {
    cuda::forward(norm, x, weight, Some(&turn(x, table)))
}

/// Gradients of `x` and of the weight.
pub fn backward(norm: RmsNorm, saved: &Saved, table: &Tensor, grad_output: &Tensor) -> [Tensor; 2] {
    cuda::backward(norm, saved, grad_output, Some(&turn(&saved.x, table)))
}

fn turn(x: &Tensor, table: &Tensor) -> Turn {
    let (_, _, heads, head) = x.size4().expect("[B, L, N, E]");
    Turn { table: table.view_as_real(), head, token: heads * head }
}
