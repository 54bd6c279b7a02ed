//! Queries and keys: normalized, then rotated by the positions of their tokens.

mod cpu;
mod cuda;
mod plain;

use tch::{Kind, Tensor};

use super::launch::{self, KernelFile};
use super::rms_norm::{self, Saved};
use super::{Bytes, Case, Misfit, Operation, Pass, RmsNorm, Rotation, Rounding, bytes, drawn};

/// A [`Rotation`] of an [`RmsNorm`], with the roundings of both.
///
/// # Shapes
/// `x`: `[B, L, N, E]`; `weight`: `[E]` for a norm of each head, or `[N · E]` for one of each
/// token; `table`: `[L, 1, E/2]` of complex f32, a constant. Returns the shape and kind of `x`.
#[derive(Clone, Copy, Debug)]
pub struct RotatedNorm {
    pub norm: RmsNorm,
}

impl Operation<3> for RotatedNorm {
    const NAME: &'static str = "rotated_norm";
    const CONSTANTS: [bool; 3] = [false, false, true];
    /// Tensors that the norm saves, and `table`.
    type Saved = (Saved, Tensor);

    fn plain(&self, [x, weight, table]: [&Tensor; 3]) -> Tensor {
        plain::rotated_norm(*self, x, weight, table)
    }

    fn kernels() -> &'static KernelFile {
        &rms_norm::cuda::KERNELS
    }

    fn takes(&self, pass: Pass, [x, weight, table]: [&Tensor; 3]) -> Result<(), Misfit> {
        Rotation.takes(pass, [x, table])?;
        let (_, _, heads, width) = x.size4().map_err(|_| Misfit::Shape)?;
        if ![width, heads * width].contains(&(weight.numel() as i64)) {
            return Err(Misfit::Shape);
        }
        self.norm.takes(pass, [&rows(x, weight), weight])
    }

    /// Tokens may be parts of larger ones, as those of a product for queries, keys and values.
    fn laid_out(pass: Pass, number: usize, input: Tensor) -> Tensor {
        if number == 0 { launch::in_rows(pass, 2, input) } else { input.contiguous() }
    }

    fn forward(&self, pass: Pass, [x, weight, table]: [Tensor; 3]) -> (Tensor, (Saved, Tensor)) {
        let output = match pass {
            Pass::Cpu => cpu::forward(self.norm, &x, &weight, &table),
            Pass::Cuda => cuda::forward(self.norm, &x, &weight, &table),
        };
        (output, (Saved { x, weight }, table))
    }

    fn backward(
        &self,
        pass: Pass,
        (saved, table): (Saved, Tensor),
        grad_output: Tensor,
    ) -> [Tensor; 3] {
        let [grad_x, grad_weight] = match pass {
            Pass::Cpu => cpu::backward(self.norm, &saved, &table, &grad_output),
            Pass::Cuda => cuda::backward(self.norm, &saved, &table, &grad_output),
        };
        [grad_x, grad_weight, Tensor::new()]
    }

    fn least_bytes(&self, [x, weight, table]: [&Tensor; 3]) -> Bytes {
        Bytes {
            forward: bytes([x, x, weight, table]),
            backward: bytes([x, x, x, weight, weight, table]),
        }
    }

    fn cases() -> Vec<Case<Self, 3>> {
        let mut cases = Vec::new();
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1.2e-2)] {
            let heads = [(3, 64, false), (5, 48, false), (4, 32, true), (12, 128, true)];
            for (heads, width, is_wide) in heads {
                for rounding in [Rounding::Once, Rounding::EachStep] {
                    let angles = drawn(&[7, 1, width / 2], Kind::Float, 2);
                    let table = Tensor::complex(&angles.cos(), &angles.sin());
                    let of_weight = if is_wide { heads * width } else { width };
                    let x = drawn(&[2, 7, heads, width], kind, 1) * 3.0;
                    let operation = RotatedNorm { norm: RmsNorm { epsilon: 1e-6, rounding } };
                    let inputs = [x, drawn(&[of_weight], kind, 3), table];
                    cases.push(Case { operation, inputs, tolerance });
                }
            }
        }
        cases
    }
}

/// `x` as the rows of which the norm is taken: `[…, E]` or `[…, N · E]`.
fn rows(x: &Tensor, weight: &Tensor) -> Tensor {
    let (batch, tokens, heads, width) = x.size4().expect("[B, L, N, E]");
    if weight.numel() as i64 == width {
        x.shallow_clone()
    } else {
        x.reshape([batch, tokens, heads * width])
    }
}
