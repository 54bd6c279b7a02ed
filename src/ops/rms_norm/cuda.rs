//! Root-mean-square normalization and its gradients by kernels of a GPU.

use tch::{Kind, Tensor};

use super::{RmsNorm, Saved};
use crate::cuda::Argument;
use crate::ops::Rounding;
use crate::ops::launch::{KernelFile, Team, column_sums, kernel_text, vector, word};

pub static KERNELS: KernelFile = KernelFile::new("rms_norm/kernel.cu", kernel_text!("kernel.cu"));

pub fn forward(norm: RmsNorm, x: &Tensor, weight: &Tensor) -> Tensor {
    let output = x.empty_like();
    let width = weight.numel() as i64;
    let (rows, team) = (x.numel() as i64 / width, Team::of_width(width));
    KERNELS.launch(
        x.device(),
        &format!("rms_norm_{}_{}", word(x), vector(width, &[x, weight, &output], 1)),
        team.each(rows),
        &[
            Argument::Tensor(x),
            Argument::Tensor(weight),
            Argument::Tensor(&output),
            Argument::Integers(&[rows]),
            Argument::Integers(&[width]),
            Argument::Numbers(&[norm.epsilon as f32]),
            Argument::Integers(&[i64::from(norm.rounding == Rounding::EachStep)]),
            Argument::Integers(&[team.size()]),
        ],
    );
    output
}

/// Gradients of `x` and of the weight.
pub fn backward(norm: RmsNorm, saved: &Saved, grad_output: &Tensor) -> [Tensor; 2] {
    let Saved { x, weight } = saved;
    let grad_x = x.empty_like();
    let width = weight.numel() as i64;
    let (rows, team) = (x.numel() as i64 / width, Team::of_width(width));
    let blocks = rows.unsigned_abs().div_ceil(team.block_rows() as u64) as i64;
    let partial = Tensor::empty([blocks, width], (Kind::Float, x.device()));
    let numbers = vector(width, &[x, weight, grad_output, &grad_x], 1);
    KERNELS.launch(
        x.device(),
        &format!("rms_norm_backward_{}_{numbers}", word(x)),
        team.summing(blocks, width),
        &[
            Argument::Tensor(x),
            Argument::Tensor(weight),
            Argument::Tensor(grad_output),
            Argument::Tensor(&grad_x),
            Argument::Tensor(&partial),
            Argument::Integers(&[rows]),
            Argument::Integers(&[width]),
            Argument::Numbers(&[norm.epsilon as f32]),
            Argument::Integers(&[team.block_rows()]),
            Argument::Integers(&[team.size()]),
        ],
    );
    [grad_x, column_sums(&partial, 1, weight.kind()).view_as(weight)]
}
