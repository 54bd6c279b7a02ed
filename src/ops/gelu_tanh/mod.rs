//! GELU's approximation by tanh.
//!
//! libtorch's operator takes most of its time for the tanh, and again in its gradient.

mod cpu;
mod cuda;
mod plain;

use tch::{Kind, Tensor};

use super::launch::{self, KernelFile};
use super::{Bytes, Case, Misfit, OfFeatures, Operation, Pass, bytes, drawn};

/// `x · (1 + tanh(sqrt(2/π) · (x + 0.044715 · x³))) / 2`.
///
/// # Shapes
/// `x`: `[…, D]`. Returns the same.
///
/// Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
#[derive(Clone, Copy, Debug)]
pub struct GeluTanh;

impl Operation<1> for GeluTanh {
    const NAME: &'static str = "gelu_tanh";
    /// `x`.
    type Saved = Tensor;

    fn plain(&self, [x]: [&Tensor; 1]) -> Tensor {
        plain::gelu_tanh(x)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, _pass: Pass, [x]: [&Tensor; 1]) -> Result<(), Misfit> {
        if x.dim() > 0 { Ok(()) } else { Err(Misfit::Shape) }
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
        Bytes { forward: bytes([x, x]), backward: bytes([x, x, x]) }
    }

    fn cases() -> Vec<Case<Self, 1>> {
        let case = |kind, tolerance, shape: &[i64]| {
            let inputs = [drawn(shape, kind, 1) * 4.0];
            Case { operation: GeluTanh, inputs, tolerance }
        };
        [(Kind::Float, 3e-7), (Kind::BFloat16, 4e-3)]
            .into_iter()
            .flat_map(|(kind, tolerance)| {
                [case(kind, tolerance, &[3, 101]), case(kind, tolerance, &[2, 5, 64])]
            })
            .collect()
    }
}

impl OfFeatures for GeluTanh {
    const BESIDE: &'static str = "gelu_tanh_beside";

    fn width(x: &Tensor) -> i64 {
        *x.size().last().expect("[…, D]")
    }

    fn write(x: &Tensor, output: &Tensor) {
        cuda::write(x, output);
    }
}
