//! Conditioning by scale, shift and gate (adaptive layer normalization).

use tch::Tensor;

use super::{Builder, Init, Linear, Views};

/// Maps a conditioning vector to `parts` vectors of the model's width; begins at zero, so that a block begins as identity.
///
/// Source: Peebles & Xie 2023, arXiv:2212.09748, section 3.2 (adaLN-Zero).
#[derive(Clone, Copy, Debug)]
pub struct Modulation {
    linear: Linear,
    parts: i64,
}

impl Modulation {
    pub fn new(builder: &mut Builder<'_>, width: i64, parts: i64) -> Self {
        Modulation { linear: Linear::new(builder, width, parts * width, Init::Zeros), parts }
    }

    /// # Shapes
    /// `conditioning`: `[B, D]`. Returns `parts` tensors `[B, 1, D]`.
    pub fn forward(&self, params: &Views, conditioning: &Tensor) -> Vec<Tensor> {
        self.linear.forward(params, &conditioning.silu()).unsqueeze(1).chunk(self.parts, -1)
    }
}

/// `x · (1 + scale) + shift`.
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Tensor {
    shift.addcmul(x, &(scale + 1.0))
}
