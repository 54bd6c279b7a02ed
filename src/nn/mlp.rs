//! Two affine maps with a nonlinearity between them.

use std::f64::consts::FRAC_2_PI;

use tch::{Kind, Tensor};

use super::{Builder, Linear, Views};
use crate::ops::{Beside, GeluTanh, SiluGate, apply};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nonlinearity {
    Silu,
    Gelu,
    /// GELU's approximation by tanh.
    GeluTanh,
    /// The same, in bfloat16 rounded after each step of the formula, as transformers' T5 has it.
    GeluTanhInSteps,
    /// GELU's approximation by `x · sigmoid(1.702 · x)`.
    QuickGelu,
    /// SiLU of the first half of the features times the second half.
    SiluGate,
}

impl Nonlinearity {
    pub fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Nonlinearity::Silu => x.silu(),
            Nonlinearity::Gelu => x.gelu("none"),
            Nonlinearity::GeluTanh => apply(GeluTanh, [x]),
            Nonlinearity::GeluTanhInSteps => match x.kind() {
                Kind::BFloat16 => gelu_tanh_in_steps(x),
                _ => apply(GeluTanh, [x]),
            },
            Nonlinearity::QuickGelu => x * (x * 1.702).sigmoid(),
            Nonlinearity::SiluGate => apply(SiluGate, [x]),
        }
    }

    /// Returns the features `first`, then those of [`apply`](Self::apply), as one tensor.
    pub fn apply_beside(self, first: &Tensor, x: &Tensor) -> Tensor {
        match self {
            Nonlinearity::GeluTanh => apply(Beside(GeluTanh), [first, x]),
            Nonlinearity::SiluGate => apply(Beside(SiluGate), [first, x]),
            _ => Tensor::cat(&[first, &self.apply(x)], -1),
        }
    }
}

/// [`GeluTanh`] by libtorch's operators, one for each step.
fn gelu_tanh_in_steps(x: &Tensor) -> Tensor {
    let inner = (x + x.pow_tensor_scalar(3.0) * 0.044715) * FRAC_2_PI.sqrt();
    x * 0.5 * (inner.tanh() + 1.0)
}

#[derive(Clone, Copy, Debug)]
pub struct Mlp {
    pub input: Linear,
    pub output: Linear,
    pub nonlinearity: Nonlinearity,
}

impl Mlp {
    /// `linear_1` and `linear_2` between the three `widths`.
    pub fn of_two_linears(
        builder: &mut Builder<'_>,
        widths: [i64; 3],
        nonlinearity: Nonlinearity,
        with_bias: bool,
    ) -> Self {
        Self::named(builder, ["linear_1", "linear_2"], widths, nonlinearity, with_bias)
    }

    /// `net.0.proj` and `net.2`, the feed-forward part of diffusers' blocks.
    pub fn feed_forward(
        builder: &mut Builder<'_>,
        widths: [i64; 3],
        nonlinearity: Nonlinearity,
    ) -> Self {
        Self::named(builder, ["net.0.proj", "net.2"], widths, nonlinearity, true)
    }

    /// `linear_in` to twice the hidden width, of which one half gates the other, and
    /// `linear_out`; without biases.
    pub fn gated(builder: &mut Builder<'_>, [inputs, hidden, outputs]: [i64; 3]) -> Self {
        let input = Linear::pytorch(&mut builder.at("linear_in"), inputs, 2 * hidden, false);
        let output = Linear::pytorch(&mut builder.at("linear_out"), hidden, outputs, false);
        Mlp { input, output, nonlinearity: Nonlinearity::SiluGate }
    }

    /// `fc1` and `fc2`, the MLP of transformers' CLIP and SigLIP.
    pub fn of_transformers(
        builder: &mut Builder<'_>,
        [width, hidden]: [i64; 2],
        nonlinearity: Nonlinearity,
    ) -> Self {
        Self::named(builder, ["fc1", "fc2"], [width, hidden, width], nonlinearity, true)
    }

    fn named(
        builder: &mut Builder<'_>,
        names: [&str; 2],
        widths: [i64; 3],
        nonlinearity: Nonlinearity,
        with_bias: bool,
    ) -> Self {
        let input = Linear::pytorch(&mut builder.at(names[0]), widths[0], widths[1], with_bias);
        Mlp {
            input,
            output: Linear::pytorch(&mut builder.at(names[1]), widths[1], widths[2], with_bias),
            nonlinearity,
        }
    }

    /// # Shapes
    /// `x`: `[…, inputs]`. Returns `[…, outputs]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        self.output.forward(params, &self.nonlinearity.apply(&self.input.forward(params, x)))
    }
}
