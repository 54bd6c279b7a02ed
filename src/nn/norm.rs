//! Normalization.

use tch::Tensor;

use super::{Builder, Init, Param, Views};
use crate::ops::{self, ModulatedNorm, Rounding, apply, at_least_float};

/// Layer normalization over the last axis with a learned scale and shift.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    weight: Param,
    bias: Param,
    epsilon: f64,
}

impl LayerNorm {
    pub fn new(builder: &mut Builder<'_>, width: i64, epsilon: f64) -> Self {
        let weight = builder.param("weight", &[width], Init::Ones);
        LayerNorm { weight, bias: builder.param("bias", &[width], Init::Zeros), epsilon }
    }

    /// # Shapes
    /// `x`: `[…, D]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        x.layer_norm(
            [width(x)],
            Some(&params[self.weight]),
            Some(&params[self.bias]),
            self.epsilon,
            false,
        )
    }

    /// As [`forward`](Self::forward), computed in f32 and rounded to the kind of `x`.
    ///
    /// # Shapes
    /// `x`: `[B, L, D]`. Returns the same.
    pub fn forward_f32(&self, params: &Views, x: &Tensor) -> Tensor {
        let kind = at_least_float(x.kind());
        let [weight, bias] = [self.weight, self.bias].map(|param| params[param].to_kind(kind));
        let norm = ModulatedNorm { epsilon: self.epsilon, rounding: Rounding::Once };
        apply(norm, [x, &weight, &bias])
    }
}

/// Root-mean-square normalization over the last axis with a learned scale.
///
/// Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    weight: Param,
    epsilon: f64,
    rounding: Rounding,
}

impl RmsNorm {
    pub fn new(builder: &mut Builder<'_>, width: i64, epsilon: f64, rounding: Rounding) -> Self {
        RmsNorm { weight: builder.param("weight", &[width], Init::Ones), epsilon, rounding }
    }

    /// # Shapes
    /// `x`: `[…, D]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let norm = ops::RmsNorm { epsilon: self.epsilon, rounding: self.rounding };
        apply(norm, [x, &params[self.weight]])
    }
}

fn width(x: &Tensor) -> i64 {
    *x.size().last().expect("a tensor with a last axis")
}
