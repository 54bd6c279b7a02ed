//! Root-mean-square normalization with a learned scale.

pub mod cpu;
pub mod cuda;
mod plain;

use tch::{Kind, Tensor};

use cuda::TokenLayout;

use super::lanes::LANES;
use super::launch::{KernelFile, Team};
use super::{Bytes, Case, Misfit, Operation, Pass, Rounding, bytes, drawn};

/// `x / sqrt(mean(x²) + epsilon) · weight`, the mean over the last axis.
///
/// Both roundings are in use: PyTorch rounds once, diffusers' own norm after each step, that is
/// before the scale as well.
///
/// # Shapes
/// `x`: `[…, D]`; `weight`: `[D]`. Returns the shape and kind of `x`.
///
/// Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    pub epsilon: f64,
    pub rounding: Rounding,
}

/// Tensors that the gradient needs.
pub struct Saved {
    pub x: Tensor,
    pub weight: Tensor,
}

impl Operation<2> for RmsNorm {
    const NAME: &'static str = "rms_norm";
    type Saved = Saved;

    fn plain(&self, [x, weight]: [&Tensor; 2]) -> Tensor {
        plain::rms_norm(*self, x, weight)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, pass: Pass, [x, weight]: [&Tensor; 2]) -> Result<(), Misfit> {
        let width = weight.numel() as i64;
        if weight.kind() != x.kind() {
            return Err(Misfit::Kind);
        }
        if x.size().last() != Some(&width) || weight.dim() != 1 {
            return Err(Misfit::Shape);
        }
        match pass {
            Pass::Cpu if width % LANES as i64 == 0 => Ok(()),
            Pass::Cpu => Err(Misfit::Shape),
            Pass::Cuda => Team::has_room(width, 1),
        }
    }

    fn forward(&self, pass: Pass, [x, weight]: [Tensor; 2]) -> (Tensor, Saved) {
        let output = match pass {
            Pass::Cpu => cpu::forward(*self, &x, &weight),
            Pass::Cuda => {
                cuda::forward(*self, &x, &weight, &TokenLayout::rows(weight.numel() as i64))
            }
        };
        (output, Saved { x, weight })
    }

    fn backward(&self, pass: Pass, saved: Saved, grad_output: Tensor) -> [Tensor; 2] {
        match pass {
            Pass::Cpu => cpu::backward(*self, &saved, &grad_output),
            Pass::Cuda => {
                let tokens = TokenLayout::rows(saved.weight.numel() as i64);
                cuda::backward(*self, &saved, &grad_output, &tokens)
            }
        }
    }

    fn least_bytes(&self, [x, weight]: [&Tensor; 2]) -> Bytes {
        Bytes { forward: bytes([x, x, weight]), backward: bytes([x, x, x, weight, weight]) }
    }

    fn cases() -> Vec<Case<Self, 2>> {
        let mut cases = Vec::new();
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 8e-3)] {
            for (rows, width) in [(70, 64), (3, 48), (33, 512), (5, 1536)] {
                for rounding in [Rounding::Once, Rounding::EachStep] {
                    let inputs =
                        [drawn(&[2, rows, width], kind, 1) * 3.0, drawn(&[width], kind, 2)];
                    let operation = RmsNorm { epsilon: 1e-6, rounding };
                    cases.push(Case { operation, inputs, tolerance });
                }
            }
        }
        cases
    }
}
