//! One stage's vector-Jacobian product. The only call of `run_backward` in training.

use tch::{Device, Kind, Tensor};

use crate::nn::Activations;
use crate::ops::autograd::custom_gradient;

/// Returns the gradient of a scalar `loss` with respect to each flowing tensor of `output`. The
/// loss must not depend on any other tensor that requires a gradient.
pub fn loss_backward(loss: &Tensor, output: &Activations) -> Vec<Tensor> {
    let inputs: Vec<&Tensor> = output.flowing().map(|(_, tensor)| tensor).collect();
    if inputs.is_empty() {
        return Vec::new();
    }
    Tensor::run_backward(&[loss], &inputs, false, false)
}

/// Returns the gradients of the stage's leaves and of its flowing inputs, given those of its
/// outputs. A gradient is undefined if the graph does not reach its tensor.
///
/// # Shapes
/// `grad_output`: one tensor for each flowing output, undefined if nothing downstream used the
/// output.
pub fn stage_backward(
    leaves: &[&Tensor],
    input: &Activations,
    output: &Activations,
    grad_output: &[Tensor],
) -> (Vec<Tensor>, Vec<Tensor>) {
    let pairs = output.flowing().zip(grad_output).filter(|(_, gradient)| gradient.defined());
    let roots: Vec<Tensor> = pairs.map(|((_, value), gradient)| root(value, gradient)).collect();
    let inputs: Vec<&Tensor> =
        leaves.iter().copied().chain(input.flowing().map(|(_, tensor)| tensor)).collect();
    if roots.is_empty() || inputs.is_empty() {
        // Nothing downstream used this stage, or nothing before it is trained.
        let undefined = input.flowing().map(|_| Tensor::new()).collect();
        return (leaves.iter().map(|_| Tensor::new()).collect(), undefined);
    }
    let mut gradients = Tensor::run_backward(&roots, &inputs, false, false);
    let grad_input = gradients.split_off(leaves.len());
    (gradients, grad_input)
}

/// Returns a scalar whose backward passes `gradient` to `value`. The bindings start every root with
/// a gradient of ones, and the product <value, gradient> as root would read and write both tensors
/// twice. The scalar is on the CPU, so that its backward runs on this thread.
fn root(value: &Tensor, gradient: &Tensor) -> Tensor {
    let number = || (Tensor::zeros([], (Kind::Float, Device::Cpu)), gradient.shallow_clone());
    custom_gradient(&[value], number, |gradient, _| vec![gradient])
}
