//! Convolutions of side 1.

use tch::Tensor;

use super::Kernel;
use crate::nn::{Builder, Views};

/// A convolution of side 1, computed as a matrix product over the channels of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Pointwise {
    kernel: Kernel,
}

impl Pointwise {
    /// `weight` `[outputs, inputs, 1, …]` with `axes` sides, and `bias`.
    pub fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64, axes: usize) -> Self {
        Pointwise { kernel: Kernel::new(builder, inputs, outputs, &vec![1; axes]) }
    }

    /// # Shapes
    /// `x`: `[…, inputs]`. Returns `[…, outputs]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let [x, weight, bias] = self.kernel.widened(params, x);
        x.linear(&weight.flatten(1, -1), Some(&bias)).to_kind(kind)
    }
}
