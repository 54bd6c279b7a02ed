//! The gate by libtorch's operators.

use tch::Tensor;

pub fn silu_gate(x: &Tensor) -> Tensor {
    let halves = x.chunk(2, -1);
    halves[0].silu() * &halves[1]
}
