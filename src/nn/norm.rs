//! Normalization.

use tch::Tensor;

/// Layer normalization over the last axis without learned scale and shift; modulation supplies both.
///
/// # Shapes
/// `x`: `[…, D]`. Returns the same.
pub fn layer_norm(x: &Tensor, epsilon: f64) -> Tensor {
    let width = *x.size().last().expect("a tensor with a last axis");
    x.layer_norm([width], None::<&Tensor>, None::<&Tensor>, epsilon, false)
}
