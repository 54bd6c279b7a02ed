//! Modulated layer normalization and its gradients by kernels of a GPU.

use tch::{Kind, Tensor};

use super::{ModulatedNorm, Normalized, Saved};
use crate::cuda::Argument;
use crate::ops::launch::{KernelFile, Team, column_sums, kernel_text, vector, word};
use crate::ops::modulation::{row_width, sharing};

pub static KERNELS: KernelFile =
    KernelFile::new("modulated_norm/kernel.cu", kernel_text!("kernel.cu"));

pub fn forward(norm: ModulatedNorm, x: &Tensor, factor: &Tensor, shift: &Tensor) -> Normalized {
    let output = x.empty_like();
    let width = row_width(x);
    let numbers = vector(width, &[x, factor, shift, &output], 1);
    let (rows, team) = (x.numel() as i64 / width, Team::of_row(width, numbers));
    let moments = Tensor::empty([rows, 2], (Kind::Float, x.device()));
    KERNELS.launch(
        x.device(),
        &format!("modulated_norm_{}_{}_{numbers}", word(x), word(factor)),
        team.each(rows),
        &[
            Argument::Tensor(x),
            Argument::Tensor(factor),
            Argument::Tensor(shift),
            Argument::Tensor(&output),
            Argument::Tensor(&moments),
            Argument::Integers(&[rows]),
            Argument::Integers(&[width]),
            Argument::Integers(&[sharing(x, factor)]),
            Argument::Numbers(&[norm.epsilon as f32]),
            Argument::Integers(&[team.size()]),
        ],
    );
    Normalized { output, moments }
}

/// Gradients of `x`, factor and shift.
pub fn backward(saved: &Saved, grad_output: &Tensor) -> [Tensor; 3] {
    let Saved { x, factor, moments } = saved;
    let grad_x = x.empty_like();
    let (width, sharing) = (row_width(x), sharing(x, factor));
    let numbers = vector(width, &[x, factor, grad_output, &grad_x], 1);
    let (modulations, team) = (factor.numel() as i64 / width, Team::of_row(width, numbers));
    let blocks = sharing.unsigned_abs().div_ceil(team.block_rows() as u64) as i64;
    let partial = Tensor::empty([2, modulations, blocks, width], (Kind::Float, x.device()));
    KERNELS.launch(
        x.device(),
        &format!("modulated_norm_backward_{}_{}_{numbers}", word(x), word(factor)),
        team.summing(modulations * blocks, 2 * width),
        &[
            Argument::Tensor(x),
            Argument::Tensor(factor),
            Argument::Tensor(moments),
            Argument::Tensor(grad_output),
            Argument::Tensor(&grad_x),
            Argument::Tensor(&partial),
            Argument::Integers(&[width]),
            Argument::Integers(&[sharing]),
            Argument::Integers(&[team.block_rows()]),
            Argument::Integers(&[team.size()]),
        ],
    );
    let sums = column_sums(&partial, 2 * modulations, factor.kind());
    let [grad_factor, grad_shift] =
        [0, 1].map(|part| sums.narrow(0, part * modulations, modulations).view_as(factor));
    [grad_x, grad_factor, grad_shift]
}
