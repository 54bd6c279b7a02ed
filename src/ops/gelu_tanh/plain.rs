//! GELU by libtorch's operator.

use tch::Tensor;

pub fn gelu_tanh(x: &Tensor) -> Tensor {
    x.gelu("tanh")
}
