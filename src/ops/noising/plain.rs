//! Noising by libtorch's operators.

use tch::Tensor;

use crate::ops::at_least_float;
use crate::tensor::broadcast_to_rank;

pub fn noising(data: &Tensor, noise: &Tensor, sigma: &Tensor) -> Tensor {
    let sigma = broadcast_to_rank(sigma, data.dim());
    // 1 − sigma is a tensor operation of its own, since the reference rounds each product before
    // the sum.
    let mut point = (sigma.ones_like() - &sigma) * data.to_kind(at_least_float(data.kind()));
    point += sigma * noise;
    point.to_kind(data.kind())
}
