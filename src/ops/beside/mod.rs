//! An operation on features, whose output is joined to other features without a pass of its own.
//!
//! Blocks that attend and feed forward at once multiply both results by one matrix, and so need
//! them as one tensor.

mod cpu;
mod cuda;
mod plain;

use tch::{Kind, Tensor};

use super::launch::KernelFile;
use super::{Bytes, Case, GeluTanh, Misfit, Operation, Pass, SiluGate, bytes, drawn};

/// An operation on the features of each row.
pub trait OfFeatures: Operation<1, Saved = Tensor> {
    /// Name of the operation beside other features.
    const BESIDE: &'static str;

    /// Features of the output.
    fn width(x: &Tensor) -> i64;

    /// Computes the output by kernels of a GPU, into rows that may lie apart; their
    /// [`backward`](Operation::backward) takes such rows of a gradient.
    fn write(x: &Tensor, output: &Tensor);
}

/// `[first, operation(x)]` along the last axis.
///
/// # Shapes
/// `first`: `[…, D]`; `x`: `[…, F]`, which the operation makes `[…, G]`, of the same kind. Returns
/// `[…, D + G]`.
#[derive(Clone, Copy, Debug)]
pub struct Beside<O>(pub O);

/// Features, and GELU of others.
pub type GeluTanhBeside = Beside<GeluTanh>;
/// Features, and gated others.
pub type SiluGateBeside = Beside<SiluGate>;

impl<O: OfFeatures> Operation<2> for Beside<O> {
    const NAME: &'static str = O::BESIDE;
    /// `x`.
    type Saved = Tensor;

    fn plain(&self, [first, x]: [&Tensor; 2]) -> Tensor {
        plain::beside(self.0, first, x)
    }

    fn kernels() -> &'static KernelFile {
        O::kernels()
    }

    fn takes(&self, pass: Pass, [first, x]: [&Tensor; 2]) -> Result<(), Misfit> {
        let rows = |tensor: &Tensor| tensor.size().split_last().map(|(_, rows)| rows.to_vec());
        if rows(first) != rows(x) {
            Err(Misfit::Shape)
        } else if first.kind() != x.kind() {
            Err(Misfit::Kind)
        } else {
            self.0.takes(pass, [x])
        }
    }

    /// The first features are copied, wherever they lie.
    fn laid_out(pass: Pass, number: usize, input: Tensor) -> Tensor {
        if number == 0 { input } else { O::laid_out(pass, 0, input) }
    }

    fn forward(&self, pass: Pass, [first, x]: [Tensor; 2]) -> (Tensor, Tensor) {
        let output = match pass {
            Pass::Cpu => cpu::forward(self.0, &first, &x),
            Pass::Cuda => cuda::forward::<O>(&first, &x),
        };
        (output, x)
    }

    fn backward(&self, pass: Pass, x: Tensor, grad_output: Tensor) -> [Tensor; 2] {
        let width = O::width(&x);
        let before = grad_output.size().last().expect("[…, D + G]") - width;
        let of_output = grad_output.narrow(-1, before, width);
        let of_output = if pass == Pass::Cpu { of_output.contiguous() } else { of_output };
        let [grad_x] = self.0.backward(pass, x, of_output);
        [grad_output.narrow(-1, 0, before), grad_x]
    }

    fn least_bytes(&self, [first, x]: [&Tensor; 2]) -> Bytes {
        let Bytes { forward, backward } = self.0.least_bytes([x]);
        Bytes { forward: forward + bytes([first, first]), backward }
    }

    fn cases() -> Vec<Case<Self, 2>> {
        let beside = |case: Case<O, 1>| {
            let Case { operation, inputs: [x], tolerance } = case;
            let mut shape = x.size();
            *shape.last_mut().expect("[…, F]") = 24;
            let inputs = [drawn(&shape, Kind::Float, 5).to_kind(x.kind()), x];
            Case { operation: Beside(operation), inputs, tolerance }
        };
        O::cases().into_iter().map(beside).collect()
    }
}
