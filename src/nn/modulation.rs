//! Conditioning by scale, shift and gate (adaptive layer normalization).
//!
//! Source: Peebles & Xie 2023, arXiv:2212.09748, section 3.2.

use tch::{Kind, Tensor};

use super::norm::layer_norm;
use super::{Builder, Linear, Rows, Views, by_hand};

/// Maps a conditioning vector to several vectors of the model's width.
#[derive(Clone, Copy, Debug)]
pub struct Modulation {
    linear: Linear,
}

impl Modulation {
    /// `linear`: from the conditioning's width to a multiple of the model's. Begun at zero, a block
    /// begins as identity.
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

/// A modulation of the whole sequence in its parts, as they lie side by side.
///
/// # Shapes
/// `all`: `[B, PARTS · D]`. Returns `PARTS` tensors `[B, 1, D]`.
pub fn parts<const PARTS: usize>(all: &Tensor) -> [Tensor; PARTS] {
    all.unsqueeze(1).chunk(PARTS as i64, -1).try_into().expect("as many chunks as parts")
}

/// `x + gate · change`.
///
/// # Shapes
/// `x`, `change`: `[B, L, D]`; `gate`: `[B, 1, D]`.
pub fn gated(x: &Tensor, gate: &Tensor, change: &Tensor) -> Tensor {
    by_hand::gated(x, gate, change).unwrap_or_else(|| add_product(x, gate, change))
}

/// [`layer_norm`] `· (1 + scale) + shift`.
///
/// # Shapes
/// `x`: `[B, L, D]`; `shift`, `scale`: `[B, 1, D]`.
pub fn modulated_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, epsilon: f64) -> Tensor {
    let factor = scale + 1.0;
    by_hand::affine_norm(x, &factor, shift, epsilon)
        .unwrap_or_else(|| add_product(shift, &layer_norm(x, epsilon), &factor))
}

/// `sum + a · b`: in one pass in f32; in bfloat16 rounded after the product as well, as diffusers
/// does, because with 8 bits the sum of so small differences over many blocks shows in the
/// gradients (up to a tenth of a small one).
fn add_product(sum: &Tensor, a: &Tensor, b: &Tensor) -> Tensor {
    if sum.kind() == Kind::Float { sum.addcmul(a, b) } else { a * b + sum }
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
        self.projection.forward(params, &modulated_norm(x, &shift, &scale, self.epsilon))
    }
}
