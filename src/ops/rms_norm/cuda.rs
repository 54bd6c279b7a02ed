//! Root-mean-square normalization and its gradients by kernels of a GPU, which rotate as well if they
//! are given angles.

use tch::{Kind, Tensor};

use super::{RmsNorm, Saved};
use crate::cuda::Argument;
use crate::ops::Rounding;
use crate::ops::launch::{KernelFile, Team, column_sums, kernel_text, vector, word};

pub static KERNELS: KernelFile = KernelFile::new("rms_norm/kernel.cu", kernel_text!("kernel.cu"));

/// Rotation of what was normalized.
pub struct Turn {
    /// `[L, 1, E/2, 2]` f32: cosine and sine of each token and pair.
    pub table: Tensor,
    /// Numbers of a head, and of a token.
    pub head: i64,
    pub token: i64,
}

pub fn forward(norm: RmsNorm, x: &Tensor, weight: &Tensor, turn: Option<&Turn>) -> Tensor {
    let output = x.empty_like();
    let width = weight.numel() as i64;
    let numbers = numbers(width, &[x, weight, &output], turn);
    let (rows, team) = (x.numel() as i64 / width, Team::of_row(width, numbers));
    let Angles { table, head, token, tokens } = Angles::of(turn);
    KERNELS.launch(
        x.device(),
        &format!("rms_norm_{}_{numbers}", word(x)),
        team.each(rows),
        &[
            Argument::Tensor(x),
            Argument::Tensor(weight),
            Argument::Tensor(&output),
            table,
            Argument::Integers(&[rows]),
            Argument::Integers(&[width]),
            Argument::Numbers(&[norm.epsilon as f32]),
            Argument::Integers(&[i64::from(norm.rounding == Rounding::EachStep)]),
            Argument::Integers(&[head]),
            Argument::Integers(&[token]),
            Argument::Integers(&[tokens]),
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
    turn: Option<&Turn>,
) -> [Tensor; 2] {
    let Saved { x, weight } = saved;
    let grad_x = x.empty_like();
    let width = weight.numel() as i64;
    let numbers = numbers(width, &[x, weight, grad_output, &grad_x], turn);
    let (rows, team) = (x.numel() as i64 / width, Team::of_row(width, numbers));
    let blocks = rows.unsigned_abs().div_ceil(team.block_rows() as u64) as i64;
    let partial = Tensor::empty([blocks, width], (Kind::Float, x.device()));
    let Angles { table, head, token, tokens } = Angles::of(turn);
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
            table,
            Argument::Integers(&[rows]),
            Argument::Integers(&[width]),
            Argument::Numbers(&[norm.epsilon as f32]),
            Argument::Integers(&[team.block_rows()]),
            Argument::Integers(&[head]),
            Argument::Integers(&[token]),
            Argument::Integers(&[tokens]),
            Argument::Integers(&[team.size()]),
        ],
    );
    [grad_x, column_sums(&partial, 1, weight.kind()).view_as(weight)]
}

/// Numbers that the kernel reads at a time: whole pairs if it rotates them.
fn numbers(width: i64, tensors: &[&Tensor], turn: Option<&Turn>) -> i64 {
    let Some(Turn { table, head, .. }) = turn else { return vector(width, tensors, 1) };
    let all: Vec<&Tensor> = tensors.iter().copied().chain([table]).collect();
    vector(*head, &all, 2)
}

/// The kernels' arguments of a rotation.
struct Angles<'t> {
    table: Argument<'t>,
    head: i64,
    token: i64,
    tokens: i64,
}

impl<'t> Angles<'t> {
    fn of(turn: Option<&'t Turn>) -> Self {
        match turn {
            None => Angles { table: Argument::Missing, head: 1, token: 1, tokens: 1 },
            Some(Turn { table, head, token }) => Angles {
                table: Argument::Tensor(table),
                head: *head,
                token: *token,
                tokens: table.size()[0],
            },
        }
    }
}
