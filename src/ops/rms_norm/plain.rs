//! Root-mean-square normalization by libtorch's operators.

use tch::Tensor;

use super::RmsNorm;
use crate::ops::Rounding;

pub fn rms_norm(RmsNorm { epsilon, rounding }: RmsNorm, x: &Tensor, weight: &Tensor) -> Tensor {
    let width = *x.size().last().expect("a tensor with a last axis");
    match rounding {
        Rounding::Once => x.rms_norm([width], Some(weight), epsilon),
        Rounding::EachStep => x.rms_norm([width], None::<&Tensor>, epsilon) * weight,
    }
}
