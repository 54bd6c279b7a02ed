//! Modulated layer normalization by libtorch's operators.

use tch::Tensor;

use super::ModulatedNorm;
use crate::ops::modulation::add_product;
use crate::ops::{Rounding, at_least_float};

pub fn modulated_norm(norm: ModulatedNorm, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Tensor {
    let ModulatedNorm { epsilon, rounding, .. } = norm;
    let factor = &norm.factor(scale);
    let width = *x.size().last().expect("a tensor with a last axis");
    let normalized =
        |x: &Tensor| x.layer_norm([width], None::<&Tensor>, None::<&Tensor>, epsilon, false);
    let wide = || x.to_kind(at_least_float(x.kind()));
    match rounding {
        Rounding::EachStep => add_product(shift, &normalized(x), factor),
        // A learned scale and shift: libtorch has an operator for the whole.
        Rounding::Once if factor.dim() == 1 => {
            wide().layer_norm([width], Some(factor), Some(shift), epsilon, false).to_kind(x.kind())
        }
        // Product and sum are rounded one after the other, as in diffusers: with a fused one, some
        // numbers would round to another bfloat16.
        Rounding::Once => (normalized(&wide()) * factor + shift).to_kind(x.kind()),
    }
}
