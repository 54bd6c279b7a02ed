//! A block's change, gated, added to the residual stream.

mod cpu;
mod cuda;
mod plain;

use tch::Tensor;

use super::launch::{self, KernelFile};
use super::{Bytes, Case, Misfit, Operation, Pass, Rounding, bytes, drawn, modulation};

/// `x + gate · change`.
///
/// FLUX rounds after each step, in the kind of `x`; Wan has gates in f32 and rounds once.
///
/// # Shapes
/// `x`, `change`: `[B, L, D]`; `gate`: `[B, 1, D]`, or `[D]` for all samples. Returns the shape and
/// kind of `x`.
///
/// Source: Peebles & Xie 2023, arXiv:2212.09748, section 3.2.
#[derive(Clone, Copy, Debug)]
pub struct GatedResidual {
    pub rounding: Rounding,
}

/// Tensors that the gradient needs.
pub struct Saved {
    gate: Tensor,
    change: Tensor,
}

impl Operation<3> for GatedResidual {
    const NAME: &'static str = "gated_residual";
    type Saved = Saved;

    fn plain(&self, [x, gate, change]: [&Tensor; 3]) -> Tensor {
        plain::gated_residual(*self, x, gate, change)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, pass: Pass, [x, gate, change]: [&Tensor; 3]) -> Result<(), Misfit> {
        modulation::takes(pass, self.rounding, x, gate)?;
        if x.kind() != change.kind() {
            Err(Misfit::Kind)
        } else if x.size() != change.size() {
            Err(Misfit::Shape)
        } else {
            Ok(())
        }
    }

    fn laid_out(pass: Pass, number: usize, input: Tensor) -> Tensor {
        if number == 1 { launch::in_rows(pass, 1, input) } else { input.contiguous() }
    }

    fn forward(&self, pass: Pass, [x, gate, change]: [Tensor; 3]) -> (Tensor, Saved) {
        let output = match pass {
            Pass::Cpu => cpu::forward(&x, &gate, &change),
            Pass::Cuda => cuda::forward(&x, &gate, &change),
        };
        (output, Saved { gate, change })
    }

    fn backward(&self, pass: Pass, saved: Saved, grad_output: Tensor) -> [Tensor; 3] {
        let [grad_gate, grad_change] = match pass {
            Pass::Cpu => cpu::backward(&saved, &grad_output),
            Pass::Cuda => cuda::backward(&saved, &grad_output),
        };
        [grad_output, grad_gate, grad_change]
    }

    fn least_bytes(&self, [x, gate, change]: [&Tensor; 3]) -> Bytes {
        Bytes {
            forward: bytes([x, change, x, gate]),
            // The gradient of x is that of the output.
            backward: bytes([change, x, change, gate, gate]),
        }
    }

    fn cases() -> Vec<Case<Self, 3>> {
        let case = |trial: modulation::Trial, batch, tokens, width| {
            let modulation::Trial { kind, rounding, tolerance } = trial;
            let of_gate = trial.modulation_kind();
            let inputs = [
                drawn(&[batch, tokens, width], kind, 1),
                drawn(&[batch, 1, width], of_gate, 2),
                drawn(&[batch, tokens, width], kind, 3),
            ];
            Case { operation: GatedResidual { rounding }, inputs, tolerance }
        };
        // Few rows, so many that a GPU adds up more of their blocks than a warp has threads, and
        // rows as wide as models have.
        let shapes = [(2, 70, 48), (1, 1200, 16), (1, 5, 1536)];
        let cases = |(batch, tokens, width)| {
            modulation::Trial::ALL.map(|trial| case(trial, batch, tokens, width))
        };
        shapes.into_iter().flat_map(cases).collect()
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn other_shapes_and_kinds_are_left_to_libtorch() {
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let takes = |rounding, x: &Tensor, gate: &Tensor| {
            GatedResidual { rounding }.takes(Pass::Cpu, [x, gate, x])
        };
        let (x, gate) = (zeros(&[2, 3, 16]), zeros(&[2, 1, 16]));
        assert_eq!(takes(Rounding::EachStep, &x, &gate), Ok(()));
        assert_eq!(takes(Rounding::EachStep, &x, &x), Err(Misfit::Shape));
        let (odd, odd_gate) = (zeros(&[2, 3, 20]), zeros(&[2, 1, 20]));
        assert_eq!(takes(Rounding::EachStep, &odd, &odd_gate), Err(Misfit::Shape));
        let narrow = x.to_kind(Kind::BFloat16);
        assert_eq!(takes(Rounding::EachStep, &narrow, &gate), Err(Misfit::Kind));
        assert_eq!(takes(Rounding::Once, &narrow, &gate), Ok(()));
    }
}
