//! Modulated layer normalization and its gradients by kernels of a GPU.

use tch::{Kind, Tensor};

use super::{ModulatedNorm, Normalized, Saved};
use crate::cuda::Argument;
use crate::ops::launch::{KernelFile, Team, column_sums, kernel_text, pitch, vector, word};
use crate::ops::modulation::{row_width, sharing};

pub static KERNELS: KernelFile =
    KernelFile::new("modulated_norm/kernel.cu", kernel_text!("kernel.cu"));

pub fn forward(norm: ModulatedNorm, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Normalized {
    let output = x.empty_like();
    let (width, pitches) = (row_width(x), [pitch(scale, 1), pitch(shift, 1)]);
    let numbers = vector(&[width, pitches[0], pitches[1]], &[x, scale, shift, &output], 1);
    let (rows, team) = (x.numel() as i64 / width, Team::of_row(width, numbers));
    let moments = Tensor::empty([rows, 2], (Kind::Float, x.device()));
    KERNELS.launch(
        x.device(),
        &format!("modulated_norm_{}_{}_{numbers}", word(x), word(scale)),
        team.each(rows),
        &[
            Argument::Tensor(x),
            Argument::Rows(scale),
            Argument::Rows(shift),
            Argument::Tensor(&output),
            Argument::Tensor(&moments),
            Argument::Integers(&[rows]),
            Argument::Integers(&[width]),
            Argument::Integers(&[sharing(x, scale)]),
            Argument::Integers(&pitches),
            Argument::Numbers(&[norm.epsilon as f32, norm.base as f32]),
            Argument::Integers(&[team.size()]),
        ],
    );
    Normalized { output, moments }
}

/// Gradients of `x`, scale and shift; that of `x` with what was `passed`.
pub fn backward(
    norm: ModulatedNorm,
    saved: &Saved,
    grad_output: &Tensor,
    passed: Option<&Tensor>,
) -> [Tensor; 3] {
    let Saved { x, scale, moments } = saved;
    let grad_x = x.empty_like();
    let (width, sharing, pitch) = (row_width(x), sharing(x, scale), pitch(scale, 1));
    let tensors = [x, scale, grad_output, passed.unwrap_or(grad_output), &grad_x];
    let numbers = vector(&[width, pitch], &tensors, 1);
    let (modulations, team) = (scale.numel() as i64 / width, Team::of_row(width, numbers));
    let blocks = sharing.unsigned_abs().div_ceil(team.block_rows() as u64) as i64;
    let partial = Tensor::empty([2, modulations, blocks, width], (Kind::Float, x.device()));
    KERNELS.launch(
        x.device(),
        &format!("modulated_norm_backward_{}_{}_{numbers}", word(x), word(scale)),
        team.summing(modulations * blocks, 2 * width),
        &[
            Argument::Tensor(x),
            Argument::Rows(scale),
            Argument::Tensor(moments),
            Argument::Tensor(grad_output),
            passed.map_or(Argument::Missing, Argument::Tensor),
            Argument::Tensor(&grad_x),
            Argument::Tensor(&partial),
            Argument::Integers(&[width]),
            Argument::Integers(&[sharing]),
            Argument::Integers(&[pitch]),
            Argument::Numbers(&[norm.base as f32]),
            Argument::Integers(&[team.block_rows()]),
            Argument::Integers(&[team.size()]),
        ],
    );
    let sums = column_sums(&partial, 2 * modulations, scale.kind());
    let [grad_scale, grad_shift] =
        [0, 1].map(|part| sums.narrow(0, part * modulations, modulations).view_as(scale));
    [grad_x, grad_scale, grad_shift]
}
