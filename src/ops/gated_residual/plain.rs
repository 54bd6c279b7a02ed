//! Gated residual by libtorch's operators.

use tch::Tensor;

use super::GatedResidual;
use crate::ops::modulation::add_product;
use crate::ops::{Rounding, at_least_float};

pub fn gated_residual(
    GatedResidual { rounding }: GatedResidual,
    x: &Tensor,
    gate: &Tensor,
    change: &Tensor,
) -> Tensor {
    match rounding {
        Rounding::EachStep => add_product(x, gate, change),
        Rounding::Once => (x.to_kind(at_least_float(x.kind())) + change * gate).to_kind(x.kind()),
    }
}
