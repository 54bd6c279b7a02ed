//! SiLU of one half of the features as a gate of the other half.

mod cpu;
mod cuda;
mod plain;

use tch::{Kind, Tensor};

use super::launch::{self, KernelFile};
use super::{Bytes, Case, Misfit, OfFeatures, Operation, Pass, bytes, drawn};

/// `silu(a) · b`, with `a` the first half of the last axis and `b` the second; SiLU is rounded to
/// the kind of `x` before the product.
///
/// # Shapes
/// `x`: `[…, 2·D]`. Returns `[…, D]` of the kind of `x`.
///
/// Source: Shazeer 2020, arXiv:2002.05202, eq. 6, which calls it SwiGLU.
#[derive(Clone, Copy, Debug)]
pub struct SiluGate;

impl Operation<1> for SiluGate {
    const NAME: &'static str = "silu_gate";
    /// `x`.
    type Saved = Tensor;

    fn plain(&self, [x]: [&Tensor; 1]) -> Tensor {
        plain::silu_gate(x)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, _pass: Pass, [x]: [&Tensor; 1]) -> Result<(), Misfit> {
        match x.size().last() {
            Some(features) if features % 2 == 0 => Ok(()),
            _ => Err(Misfit::Shape),
        }
    }

    fn laid_out(pass: Pass, _number: usize, x: Tensor) -> Tensor {
        launch::in_rows(pass, 1, x)
    }

    fn forward(&self, pass: Pass, [x]: [Tensor; 1]) -> (Tensor, Tensor) {
        let output = match pass {
            Pass::Cpu => cpu::forward(&x),
            Pass::Cuda => cuda::forward(&x),
        };
        (output, x)
    }

    fn backward(&self, pass: Pass, x: Tensor, grad_output: Tensor) -> [Tensor; 1] {
        [match pass {
            Pass::Cpu => cpu::backward(&x, &grad_output),
            Pass::Cuda => cuda::backward(&x, &grad_output),
        }]
    }

    fn least_bytes(&self, [x]: [&Tensor; 1]) -> Bytes {
        let output = bytes([x]) / 2;
        Bytes { forward: bytes([x]) + output, backward: bytes([x, x]) + output }
    }

    fn cases() -> Vec<Case<Self, 1>> {
        let case = |kind, tolerance, shape: &[i64]| {
            let inputs = [drawn(shape, kind, 1) * 4.0];
            Case { operation: SiluGate, inputs, tolerance }
        };
        [(Kind::Float, 5e-7), (Kind::BFloat16, 8e-3)]
            .into_iter()
            .flat_map(|(kind, tolerance)| {
                [case(kind, tolerance, &[3, 202]), case(kind, tolerance, &[2, 5, 64])]
            })
            .collect()
    }
}

impl OfFeatures for SiluGate {
    const BESIDE: &'static str = "silu_gate_beside";

    fn width(x: &Tensor) -> i64 {
        x.size().last().expect("[…, 2·D]") / 2
    }

    fn write(x: &Tensor, output: &Tensor) {
        cuda::write(x, output);
    }
}

/// A tensor for the output: half of the features of `x`.
fn half_of(x: &Tensor) -> Tensor {
    let mut shape = x.size();
    *shape.last_mut().expect("[…, 2·D]") = SiluGate::width(x);
    Tensor::empty(shape.as_slice(), (x.kind(), x.device()))
}
