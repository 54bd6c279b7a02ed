//! Normalization.

use tch::Tensor;

use super::{Builder, Init, Param, Views};
use crate::ops::{
    self, ModulatedNorm, RotatedNorm, Rounding, apply, apply_passing_on, at_least_float,
};

/// Norms of channels below this one count as this one.
const LEAST_NORM: f64 = 1e-12;

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

    /// As [`forward`](Self::forward), computed in f32 and rounded to the kind of `x`. Returns `x`
    /// for its other uses, and what is normalized.
    ///
    /// # Shapes
    /// `x`: `[B, L, D]`. Returns two of that shape.
    pub fn forward_f32(&self, params: &Views, x: &Tensor) -> (Tensor, Tensor) {
        let kind = at_least_float(x.kind());
        let [weight, bias] = [self.weight, self.bias].map(|param| params[param].to_kind(kind));
        let norm = ModulatedNorm { epsilon: self.epsilon, base: 0.0, rounding: Rounding::Once };
        apply_passing_on(norm, [x, &weight, &bias])
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
        apply(self.operation(), [x, &params[self.weight]])
    }

    /// Normalizes queries or keys, each head or each token as the norm is wide, and rotates them.
    ///
    /// # Shapes
    /// `x`: `[B, L, N, E]`; `table`: `[L, 1, E/2]` of [`rope`](super::rope). Returns the shape and
    /// kind of `x`.
    pub fn rotated(&self, params: &Views, x: &Tensor, table: &Tensor) -> Tensor {
        apply(RotatedNorm { norm: self.operation() }, [x, &params[self.weight], table])
    }

    fn operation(&self) -> ops::RmsNorm {
        ops::RmsNorm { epsilon: self.epsilon, rounding: self.rounding }
    }
}

/// Normalization over groups of channels and all places, with a learned scale and shift.
///
/// Source: Wu & He 2018, arXiv:1803.08494.
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm {
    weight: Param,
    bias: Param,
    groups: i64,
    epsilon: f64,
}

impl GroupNorm {
    /// `channels` is a multiple of `groups`.
    pub fn new(builder: &mut Builder<'_>, channels: i64, groups: i64, epsilon: f64) -> Self {
        let weight = builder.param("weight", &[channels], Init::Ones);
        let bias = builder.param("bias", &[channels], Init::Zeros);
        GroupNorm { weight, bias, groups, epsilon }
    }

    /// # Shapes
    /// `x`: `[B, C, …]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let (weight, bias) = (&params[self.weight], &params[self.bias]);
        x.group_norm(self.groups, Some(weight), Some(bias), self.epsilon, true)
    }
}

/// Each place's channels divided by their root mean square, with a learned scale.
///
/// The norm is taken in f32 at least; what is divided by it and each product are rounded to the
/// kind of the input, as in diffusers' autoencoders of videos.
#[derive(Clone, Copy, Debug)]
pub struct ChannelNorm {
    gamma: Param,
    channels: i64,
}

impl ChannelNorm {
    /// `gamma` `[channels, 1, …]` for inputs of `axes` axes behind the channels.
    pub fn new(builder: &mut Builder<'_>, channels: i64, axes: usize) -> Self {
        let shape = [&[channels][..], &vec![1; axes]].concat();
        ChannelNorm { gamma: builder.param("gamma", &shape, Init::Ones), channels }
    }

    /// # Shapes
    /// `x`: `[B, C, …]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let wide = x.to_kind(at_least_float(x.kind()));
        let norm = wide.norm_scalaropt_dim(2.0, [1i64], true).clamp_min(LEAST_NORM);
        let directions = (wide / norm).to_kind(x.kind());
        directions * (self.channels as f64).sqrt() * &params[self.gamma]
    }
}

fn width(x: &Tensor) -> i64 {
    *x.size().last().expect("a tensor with a last axis")
}
