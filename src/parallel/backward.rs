//! One stage's vector-Jacobian product. The only backward pass in training.

use tch::Tensor;

use crate::libtorch::gradients;
use crate::nn::Activations;

/// Returns the gradient of a scalar `loss` with respect to each flowing tensor of `output`. The
/// loss must not depend on any other tensor that requires a gradient.
pub fn loss_backward(loss: &Tensor, output: &Activations) -> Vec<Tensor> {
    let inputs: Vec<&Tensor> = output.flowing().map(|(_, tensor)| tensor).collect();
    if inputs.is_empty() {
        return Vec::new();
    }
    gradients(&[loss], &[&loss.ones_like()], &inputs)
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
    // What a stage hands on of a frozen one before it has no graph here.
    let (roots, given): (Vec<&Tensor>, Vec<&Tensor>) = output
        .flowing()
        .map(|(_, value)| value)
        .zip(grad_output)
        .filter(|(value, gradient)| value.requires_grad() && gradient.defined())
        .unzip();
    let inputs: Vec<&Tensor> =
        leaves.iter().copied().chain(input.flowing().map(|(_, tensor)| tensor)).collect();
    if roots.is_empty() || inputs.is_empty() {
        // Nothing downstream used this stage, or nothing before it is trained.
        let undefined = input.flowing().map(|_| Tensor::new()).collect();
        return (leaves.iter().map(|_| Tensor::new()).collect(), undefined);
    }
    let mut of_leaves = gradients(&roots, &given, &inputs);
    let grad_input = of_leaves.split_off(leaves.len());
    (of_leaves, grad_input)
}
