//! Conditioning by scale, shift and gate (adaptive layer normalization).
//!
//! Source: Peebles & Xie 2023, arXiv:2212.09748, section 3.2.

use tch::Tensor;

use super::{Builder, Linear, Rows, Views};
use crate::ops::{GatedResidual, ModulatedNorm, Rounding, apply, apply_passing_on};

/// Maps a conditioning vector to several vectors of the model's width.
#[derive(Clone, Copy, Debug)]
pub struct Modulation {
    linear: Linear,
}

impl Modulation {
    /// `linear`: from the conditioning's width to a multiple of the model's. If it is initialized
    /// to zero, a block starts as the identity.
    pub fn new(linear: Linear) -> Self {
        Modulation { linear }
    }

    /// # Shapes
    /// `conditioning`: `[B, D]`. Returns `PARTS` tensors `[B, 1, D]`.
    pub fn forward<const PARTS: usize>(
        &self,
        params: &Views,
        conditioning: &Tensor,
    ) -> [Tensor; PARTS] {
        parts(&self.linear.forward(params, &conditioning.silu()))
    }
}

/// Splits a modulation of the whole sequence into its parts.
///
/// # Shapes
/// `all`: `[B, PARTS · D]`. Returns `PARTS` tensors `[B, 1, D]`.
pub fn parts<const PARTS: usize>(all: &Tensor) -> [Tensor; PARTS] {
    all.unsqueeze(1).chunk(PARTS as i64, -1).try_into().expect("as many chunks as parts")
}

/// `x + gate · change`, rounded after each step.
///
/// # Shapes
/// `x`, `change`: `[B, L, D]`; `gate`: `[B, 1, D]`.
pub fn gated(x: &Tensor, gate: &Tensor, change: &Tensor) -> Tensor {
    apply(GatedResidual { rounding: Rounding::EachStep }, [x, gate, change])
}

/// Layer normalization `· (1 + scale) + shift`, rounded after each step. Returns `x` for its other
/// uses, mostly the residual sum, and what is normalized.
///
/// # Shapes
/// `x`: `[B, L, D]`; `shift`, `scale`: `[B, 1, D]`. Returns two of the shape of `x`.
pub fn modulated_norm(
    x: &Tensor,
    shift: &Tensor,
    scale: &Tensor,
    epsilon: f64,
) -> (Tensor, Tensor) {
    let norm = ModulatedNorm { epsilon, base: 1.0, rounding: Rounding::EachStep };
    apply_passing_on(norm, [x, scale, shift])
}

/// As [`gated`], computed in f32 and rounded once, with a gate in f32.
pub fn gated_f32(x: &Tensor, gate: &Tensor, change: &Tensor) -> Tensor {
    apply(GatedResidual { rounding: Rounding::Once }, [x, gate, change])
}

/// As [`modulated_norm`], computed in f32 and rounded once, with a modulation in f32.
pub fn modulated_norm_f32(
    x: &Tensor,
    shift: &Tensor,
    scale: &Tensor,
    epsilon: f64,
) -> (Tensor, Tensor) {
    let norm = ModulatedNorm { epsilon, base: 1.0, rounding: Rounding::Once };
    apply_passing_on(norm, [x, scale, shift])
}

/// The last layer of most families: modulated normalization, then an affine map to the output's
/// features.
#[derive(Clone, Copy, Debug)]
pub struct ModulatedProjection {
    modulation: Modulation,
    projection: Linear,
    epsilon: f64,
}

impl ModulatedProjection {
    /// `norm_out.linear` and `proj_out` of `builder`.
    pub fn new(
        builder: &mut Builder<'_>,
        width: i64,
        outputs: i64,
        with_bias: bool,
        epsilon: f64,
    ) -> Self {
        let modulation = Modulation::new(Linear::pytorch(
            &mut builder.at("norm_out.linear").over(Rows::One),
            width,
            2 * width,
            with_bias,
        ));
        ModulatedProjection {
            modulation,
            projection: Linear::pytorch(&mut builder.at("proj_out"), width, outputs, with_bias),
            epsilon,
        }
    }

    /// # Shapes
    /// `x`: `[B, L, D]`; `conditioning`: `[B, D]`. Returns `[B, L, outputs]`.
    pub fn forward(&self, params: &Views, x: &Tensor, conditioning: &Tensor) -> Tensor {
        let [scale, shift] = self.modulation.forward(params, conditioning);
        let (_, ready) = modulated_norm(x, &shift, &scale, self.epsilon);
        self.projection.forward(params, &ready)
    }
}
