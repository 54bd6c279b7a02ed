//! The squared error and its gradient by libtorch's operators.

use tch::{Reduction, Tensor};

use crate::ops::at_least_float;

pub fn squared_error(prediction: &Tensor, target: &Tensor) -> Tensor {
    let [prediction, target] = [prediction, target].map(widened);
    prediction.mse_loss(&target, Reduction::None)
}

/// The gradient of the prediction.
pub fn gradient(prediction: &Tensor, target: &Tensor, grad_output: &Tensor) -> Tensor {
    let gradient = widened(prediction).mse_loss_backward(grad_output, target, Reduction::None);
    gradient.to_kind(prediction.kind())
}

fn widened(numbers: &Tensor) -> Tensor {
    numbers.to_kind(at_least_float(numbers.kind()))
}
