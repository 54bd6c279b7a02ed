//! The squared error of a prediction.

mod cuda;
mod plain;

use tch::{Kind, Tensor};

use super::launch::KernelFile;
use super::{Bytes, Case, Misfit, Operation, Pass, bytes, drawn};

/// `(prediction − target)²` of each element, in f32.
///
/// # Shapes
/// `prediction`: `[…]`; `target`: the same, f32, a constant. Returns the same, f32.
#[derive(Clone, Copy, Debug)]
pub struct SquaredError;

/// Tensors that the gradient needs.
pub struct Saved {
    prediction: Tensor,
    target: Tensor,
}

impl Operation<2> for SquaredError {
    const NAME: &'static str = "squared_error";
    const CONSTANTS: [bool; 2] = [false, true];
    type Saved = Saved;

    fn plain(&self, [prediction, target]: [&Tensor; 2]) -> Tensor {
        plain::squared_error(prediction, target)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, _pass: Pass, [prediction, target]: [&Tensor; 2]) -> Result<(), Misfit> {
        if target.kind() != Kind::Float {
            Err(Misfit::Kind)
        } else if prediction.size() != target.size() {
            Err(Misfit::Shape)
        } else {
            Ok(())
        }
    }

    fn forward(&self, pass: Pass, [prediction, target]: [Tensor; 2]) -> (Tensor, Saved) {
        let errors = match pass {
            Pass::Cpu => plain::squared_error(&prediction, &target),
            Pass::Cuda => cuda::forward(&prediction, &target),
        };
        (errors, Saved { prediction, target })
    }

    fn backward(&self, pass: Pass, saved: Saved, grad_output: Tensor) -> [Tensor; 2] {
        let Saved { prediction, target } = saved;
        let gradient = match pass {
            Pass::Cpu => plain::gradient(&prediction, &target, &grad_output),
            Pass::Cuda => cuda::backward(&prediction, &target, &grad_output),
        };
        [gradient, Tensor::new()]
    }

    fn least_bytes(&self, [prediction, target]: [&Tensor; 2]) -> Bytes {
        Bytes {
            forward: bytes([prediction, target, target]),
            backward: bytes([prediction, target, target, prediction]),
        }
    }

    fn cases() -> Vec<Case<Self, 2>> {
        let case = |kind, tolerance, shape: &[i64]| {
            let inputs = [drawn(shape, kind, 1), drawn(shape, Kind::Float, 2)];
            Case { operation: SquaredError, inputs, tolerance }
        };
        [(Kind::Float, 3e-7), (Kind::BFloat16, 4e-3)]
            .into_iter()
            .flat_map(|(kind, tolerance)| {
                [case(kind, tolerance, &[3, 101]), case(kind, tolerance, &[2, 4, 6, 8])]
            })
            .collect()
    }
}
