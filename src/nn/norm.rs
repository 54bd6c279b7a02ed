//! Normalization.

use tch::{Kind, Tensor};

use super::{Builder, Init, Param, Views, by_hand};

/// Layer normalization over the last axis without learned scale and shift; modulation supplies
/// both.
///
/// # Shapes
/// `x`: `[…, D]`. Returns the same.
pub fn layer_norm(x: &Tensor, epsilon: f64) -> Tensor {
    x.layer_norm([width(x)], None::<&Tensor>, None::<&Tensor>, epsilon, false)
}

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
    pub fn forward_f32(&self, params: &Views, x: &Tensor) -> Tensor {
        let (weight, bias) =
            (params[self.weight].to_kind(Kind::Float), params[self.bias].to_kind(Kind::Float));
        by_hand::affine_norm(x, &weight, &bias, self.epsilon).unwrap_or_else(|| {
            x.to_kind(Kind::Float)
                .layer_norm([width(x)], Some(weight), Some(bias), self.epsilon, false)
                .to_kind(x.kind())
        })
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

/// When a root-mean-square normalization in bfloat16 rounds; there are two in use, PyTorch's and
/// diffusers' own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Behind the learned scale.
    Once,
    /// Before it as well.
    BeforeScale,
}

impl RmsNorm {
    pub fn new(builder: &mut Builder<'_>, width: i64, epsilon: f64, rounding: Rounding) -> Self {
        RmsNorm { weight: builder.param("weight", &[width], Init::Ones), epsilon, rounding }
    }

    /// # Shapes
    /// `x`: `[…, D]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let weight = &params[self.weight];
        if let Some(normalized) =
            by_hand::rms_norm(x, weight, self.epsilon, self.rounding == Rounding::BeforeScale)
        {
            return normalized;
        }
        match self.rounding {
            Rounding::Once => x.rms_norm([width(x)], Some(weight), self.epsilon),
            Rounding::BeforeScale => x.rms_norm([width(x)], None::<&Tensor>, self.epsilon) * weight,
        }
    }
}

fn width(x: &Tensor) -> i64 {
    *x.size().last().expect("a tensor with a last axis")
}
