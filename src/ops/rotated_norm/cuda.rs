//! Normalization and rotation by one kernel of a GPU, that of `rms_norm`.

use tch::Tensor;

use crate::ops::RmsNorm;
use crate::ops::launch::pitch;
use crate::ops::rms_norm::Saved;
use crate::ops::rms_norm::cuda::{self, TokenLayout};

pub fn forward(norm: RmsNorm, x: &Tensor, weight: &Tensor, table: &Tensor) -> Tensor {
    cuda::forward(norm, x, weight, &tokens(x, &table.view_as_real()))
}

/// Gradients of `x` and of the weight.
pub fn backward(norm: RmsNorm, saved: &Saved, table: &Tensor, grad_output: &Tensor) -> [Tensor; 2] {
    cuda::backward(norm, saved, grad_output, &tokens(&saved.x, &table.view_as_real()))
}

fn tokens<'t>(x: &Tensor, table: &'t Tensor) -> TokenLayout<'t> {
    let (_, _, heads, head) = x.size4().expect("[B, L, N, E]");
    TokenLayout { table: Some(table), head, token: heads * head, pitch: pitch(x, 2) }
}
