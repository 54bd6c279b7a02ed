//! Rotation by libtorch's operators: a product of complex numbers.

use tch::Tensor;

use crate::ops::at_least_float;

pub fn rotation(x: &Tensor, table: &Tensor) -> Tensor {
    let (batch, tokens, heads, width) = x.size4().expect("[B, L, N, E]");
    let pairs = x
        .to_kind(at_least_float(x.kind()))
        .reshape([batch, tokens, heads, width / 2, 2])
        .view_as_complex();
    (pairs * table).view_as_real().flatten(3, 4).to_kind(x.kind())
}
