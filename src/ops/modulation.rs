//! Conditions that the operations on modulated tokens share.

use tch::{Kind, Tensor};

use super::lanes::LANES;
use super::{Misfit, Pass, Rounding};
use crate::tensor::Element;

/// Kind of the tokens, rounding, and the error that a few roundings cause, to verify.
pub struct Trial {
    pub kind: Kind,
    pub rounding: Rounding,
    pub tolerance: f64,
}

impl Trial {
    pub const ALL: [Trial; 4] = [
        Trial { kind: Kind::Float, rounding: Rounding::EachStep, tolerance: 2e-6 },
        Trial { kind: Kind::Float, rounding: Rounding::Once, tolerance: 2e-6 },
        Trial { kind: Kind::BFloat16, rounding: Rounding::Once, tolerance: 6e-3 },
        Trial { kind: Kind::BFloat16, rounding: Rounding::EachStep, tolerance: 1.2e-2 },
    ];

    /// Kind of the modulation.
    pub fn modulation_kind(&self) -> Kind {
        modulation_kind(self.kind, self.rounding)
    }
}

/// Kind of the modulation of tokens of `kind`: that of the intermediate numbers.
fn modulation_kind(kind: Kind, rounding: Rounding) -> Kind {
    match rounding {
        Rounding::EachStep => kind,
        Rounding::Once => Kind::Float,
    }
}

/// Checks tokens `x` `[B, L, D]` and a modulation of them, `[B, 1, D]` for each sample or `[D]` for
/// all. Its kind is that of the intermediate numbers; on a CPU rows must be whole vectors.
pub fn takes(
    pass: Pass,
    rounding: Rounding,
    x: &Tensor,
    modulation: &Tensor,
) -> Result<(), Misfit> {
    let (batch, _, width) = x.size3().map_err(|_| Misfit::Shape)?;
    let shapes = [vec![batch, 1, width], vec![width]];
    let is_whole = pass != Pass::Cpu || width % LANES as i64 == 0;
    if !shapes.contains(&modulation.size()) || !is_whole {
        return Err(Misfit::Shape);
    }
    if modulation.kind() == modulation_kind(x.kind(), rounding) {
        Ok(())
    } else {
        Err(Misfit::Kind)
    }
}

/// Numbers of a row of `x` `[B, L, D]`.
pub fn row_width(x: &Tensor) -> i64 {
    *x.size().last().expect("[B, L, D]")
}

/// Vectors of a row of `x` `[B, L, D]`.
pub fn vectors_of_row(x: &Tensor) -> usize {
    row_width(x) as usize / LANES
}

/// Rows of `x` `[B, L, D]` that share a row of its modulation.
pub fn sharing(x: &Tensor, modulation: &Tensor) -> i64 {
    (x.numel() / modulation.numel()) as i64
}

/// The gradient of a modulation as a tensor of its shape and kind `M`.
pub fn gradient<M: Element>(sums: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(sums).to_kind(M::KIND).view(shape)
}

/// `sum + a · b`: in one operator in f32; in bfloat16 rounded after the product as well, as
/// diffusers does, because with 8 bits the sum of so small differences over many blocks shows in
/// the gradients (up to a tenth of a small one).
pub fn add_product(sum: &Tensor, a: &Tensor, b: &Tensor) -> Tensor {
    if sum.kind() == Kind::Float { sum.addcmul(a, b) } else { a * b + sum }
}
