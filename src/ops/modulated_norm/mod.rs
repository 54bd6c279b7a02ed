//! Layer normalization with a modulation in the place of a learned scale and shift.

mod cpu;
mod cuda;
mod plain;

use tch::Tensor;

use super::launch::{self, KernelFile, Team};
use super::{Bytes, Case, Misfit, Operation, Pass, PassingOn, Rounding, bytes, drawn, modulation};

/// `n · (base + scale) + shift`, with n of mean 0 and variance 1 over the last axis of `x`.
///
/// FLUX rounds after each step, in the kind of `x`; Wan has a modulation in f32 and rounds once.
///
/// # Shapes
/// `x`: `[B, L, D]`; `scale`, `shift`: `[B, 1, D]`, or `[D]` for all samples. Returns the shape and
/// kind of `x`.
///
/// Source: Ba et al. 2016, arXiv:1607.06450, section 3; modulated: Peebles & Xie 2023,
/// arXiv:2212.09748, section 3.2.
#[derive(Clone, Copy, Debug)]
pub struct ModulatedNorm {
    pub epsilon: f64,
    /// 1 for a modulation; 0 for a learned scale.
    pub base: f64,
    pub rounding: Rounding,
}

/// A normalization's output, and the moments of its rows.
struct Normalized {
    output: Tensor,
    moments: Tensor,
}

/// Tensors that the gradient needs.
pub struct Saved {
    x: Tensor,
    scale: Tensor,
    /// `[B · L, 2]` f32: mean of a row, and one over the root of its variance and epsilon.
    moments: Tensor,
}

impl Operation<3> for ModulatedNorm {
    const NAME: &'static str = "modulated_norm";
    type Saved = Saved;

    fn plain(&self, [x, scale, shift]: [&Tensor; 3]) -> Tensor {
        plain::modulated_norm(*self, x, scale, shift)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, pass: Pass, [x, scale, shift]: [&Tensor; 3]) -> Result<(), Misfit> {
        modulation::takes(pass, self.rounding, x, scale)?;
        modulation::takes(pass, self.rounding, x, shift)?;
        if scale.size() != shift.size() {
            return Err(Misfit::Shape);
        }
        let width = modulation::row_width(x);
        match pass {
            Pass::Cpu => Ok(()),
            Pass::Cuda => Team::has_room(width, 2),
        }
    }

    fn laid_out(pass: Pass, number: usize, input: Tensor) -> Tensor {
        if number == 0 { input.contiguous() } else { launch::in_rows(pass, 1, input) }
    }

    fn forward(&self, pass: Pass, [x, scale, shift]: [Tensor; 3]) -> (Tensor, Saved) {
        let Normalized { output, moments } = match pass {
            Pass::Cpu => cpu::forward(*self, &x, &scale, &shift),
            Pass::Cuda => cuda::forward(*self, &x, &scale, &shift),
        };
        (output, Saved { x, scale, moments })
    }

    fn backward(&self, pass: Pass, saved: Saved, grad_output: Tensor) -> [Tensor; 3] {
        self.backward_onto(pass, saved, grad_output, None)
    }

    fn least_bytes(&self, [x, scale, shift]: [&Tensor; 3]) -> Bytes {
        let moments = 8 * x.numel() as u64 / modulation::row_width(x) as u64;
        Bytes {
            forward: bytes([x, x, scale, shift]) + moments,
            backward: bytes([x, x, x, scale, scale, shift]) + moments,
        }
    }

    fn cases() -> Vec<Case<Self, 3>> {
        let mut cases = Vec::new();
        for trial in modulation::Trial::ALL {
            let of_modulation = trial.modulation_kind();
            // Rows that one warp of a GPU reads, that several do, and that need more of a block's
            // memory than is usual.
            for (x, shape, base) in [
                ([2, 70, 48], vec![2, 1, 48], 1.0),
                ([2, 70, 48], vec![48], 0.0),
                ([1, 5, 1536], vec![1, 1, 1536], 1.0),
                ([1, 3, 6144], vec![1, 1, 6144], 1.0),
            ] {
                let inputs = [
                    drawn(&x, trial.kind, 1) * 3.0 + 1.0,
                    drawn(&shape, of_modulation, 2),
                    drawn(&shape, of_modulation, 3),
                ];
                let rounding = trial.rounding;
                let operation = ModulatedNorm { epsilon: 1e-6, base, rounding };
                cases.push(Case { operation, inputs, tolerance: trial.tolerance });
            }
        }
        cases
    }
}

impl PassingOn<3> for ModulatedNorm {
    fn backward_onto(
        &self,
        pass: Pass,
        saved: Saved,
        grad_output: Tensor,
        passed: Option<&Tensor>,
    ) -> [Tensor; 3] {
        match pass {
            Pass::Cpu => {
                let [mut grad_x, scale, shift] = cpu::backward(*self, &saved, &grad_output);
                drop(passed.map(|passed| grad_x.g_add_(passed)));
                [grad_x, scale, shift]
            }
            Pass::Cuda => cuda::backward(*self, &saved, &grad_output, passed),
        }
    }
}

impl ModulatedNorm {
    /// Returns the factor of the normalized rows, rounded to the kind of the scale.
    fn factor(&self, scale: &Tensor) -> Tensor {
        if self.base == 0.0 { scale.shallow_clone() } else { scale + self.base }
    }
}
