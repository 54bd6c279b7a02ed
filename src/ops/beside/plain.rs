//! The operation and a concatenation.

use tch::Tensor;

use super::OfFeatures;

pub fn beside<O: OfFeatures>(operation: O, first: &Tensor, x: &Tensor) -> Tensor {
    Tensor::cat(&[first, &operation.plain([x])], -1)
}
