//! Root-mean-square normalization and its gradients by kernels of a GPU, which rotate as well if
//! they are given angles.

use tch::{Kind, Tensor};

use super::{RmsNorm, Saved};
use crate::cuda::Argument;
use crate::ops::Rounding;
use crate::ops::launch::{KernelFile, Team, column_sums, kernel_text, vector, without_gaps, word};

pub static KERNELS: KernelFile = KernelFile::new("rms_norm/kernel.cu", kernel_text!("kernel.cu"));

/// The tokens whose parts are the rows that are normalized.
pub struct TokenLayout<'t> {
    /// `[L, 1, E/2, 2]` f32: cosine and sine of each token and pair; `None` if nothing turns.
    pub table: Option<&'t Tensor>,
    /// Numbers of a head.
    pub head: i64,
    /// Numbers of a token.
    pub token: i64,
    /// Numbers from the beginning of a token of `x` to that of the next one.
    pub pitch: i64,
}

impl TokenLayout<'_> {
    /// Rows that are tokens of one head, without gaps.
    pub fn rows(width: i64) -> Self {
        TokenLayout { table: None, head: width, token: width, pitch: width }
    }

    /// Numbers that the kernel reads at a time: whole pairs if it rotates them.
    fn numbers(&self, tensors: &[&Tensor]) -> i64 {
        let all: Vec<&Tensor> = tensors.iter().copied().chain(self.table).collect();
        vector(&[self.head, self.pitch], &all, if self.table.is_some() { 2 } else { 1 })
    }

    fn table(&self) -> Argument<'_> {
        self.table.map_or(Argument::Missing, Argument::Tensor)
    }

    /// The kernels' `Sizes`.
    fn sizes(&self) -> [i64; 4] {
        [self.head, self.token, self.pitch, self.table.map_or(1, |table| table.size()[0])]
    }
}

pub fn forward(norm: RmsNorm, x: &Tensor, weight: &Tensor, tokens: &TokenLayout<'_>) -> Tensor {
    let output = without_gaps(x);
    let width = weight.numel() as i64;
    let numbers = tokens.numbers(&[x, weight, &output]);
    let (rows, team) = (x.numel() as i64 / width, Team::of_row(width, numbers));
    KERNELS.launch(
        x.device(),
        &format!("rms_norm_{}_{numbers}", word(x)),
        team.each(rows),
        &[
            Argument::Rows(x),
            Argument::Tensor(weight),
            Argument::Tensor(&output),
            tokens.table(),
            Argument::Integers(&[rows]),
            Argument::Integers(&[width]),
            Argument::Numbers(&[norm.epsilon as f32]),
            Argument::Integers(&[i64::from(norm.rounding == Rounding::EachStep)]),
            Argument::Integers(&tokens.sizes()),
            Argument::Integers(&[team.size()]),
        ],
    );
    output
}

/// Gradients of `x` and of the weight.
pub fn backward(
    norm: RmsNorm,
    saved: &Saved,
    grad_output: &Tensor,
    tokens: &TokenLayout<'_>,
) -> [Tensor; 2] {
    let Saved { x, weight } = saved;
    let grad_x = without_gaps(x);
    let width = weight.numel() as i64;
    let numbers = tokens.numbers(&[x, weight, grad_output, &grad_x]);
    let (rows, team) = (x.numel() as i64 / width, Team::of_row(width, numbers));
    let blocks = rows.unsigned_abs().div_ceil(team.block_rows() as u64) as i64;
    let partial = Tensor::empty([blocks, width], (Kind::Float, x.device()));
    KERNELS.launch(
        x.device(),
        &format!("rms_norm_backward_{}_{numbers}", word(x)),
        team.summing(blocks, width),
        &[
            Argument::Rows(x),
            Argument::Tensor(weight),
            Argument::Tensor(grad_output),
            Argument::Tensor(&grad_x),
            Argument::Tensor(&partial),
            tokens.table(),
            Argument::Integers(&[rows]),
            Argument::Integers(&[width]),
            Argument::Numbers(&[norm.epsilon as f32]),
            Argument::Integers(&[team.block_rows()]),
            Argument::Integers(&tokens.sizes()),
            Argument::Integers(&[team.size()]),
        ],
    );
    [grad_x, column_sums(&partial, 1, weight.kind()).view_as(weight)]
}
