//! Normalization and rotation, one after the other.

use tch::Tensor;

use super::{RotatedNorm, rows};
use crate::ops::{Operation, Rotation};

pub fn rotated_norm(
    RotatedNorm { norm }: RotatedNorm,
    x: &Tensor,
    weight: &Tensor,
    table: &Tensor,
) -> Tensor {
    Rotation.plain([&norm.plain([&rows(x, weight), weight]).view_as(x), table])
}
