//! The squared error and its gradient by kernels of a GPU.

use tch::Tensor;

use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, kernel_text, vector, word};

pub static KERNELS: KernelFile =
    KernelFile::new("squared_error/kernel.cu", kernel_text!("kernel.cu"));

pub fn forward(prediction: &Tensor, target: &Tensor) -> Tensor {
    let errors = target.empty_like();
    launch("squared_error", &[prediction, target, &errors]);
    errors
}

pub fn backward(prediction: &Tensor, target: &Tensor, grad_output: &Tensor) -> Tensor {
    let gradient = prediction.empty_like();
    launch("squared_error_backward", &[prediction, target, grad_output, &gradient]);
    gradient
}

/// Launches a kernel that has a thread for each vector of the tensors, the prediction first.
fn launch(name: &str, tensors: &[&Tensor]) {
    let prediction = tensors[0];
    let length = prediction.numel() as i64;
    let numbers = vector(&[length], tensors, 1);
    let count = [length / numbers];
    let tensors = tensors.iter().map(|tensor| Argument::Tensor(tensor));
    let arguments: Vec<Argument<'_>> = tensors.chain([Argument::Integers(&count)]).collect();
    let name = format!("{name}_{}_{numbers}", word(prediction));
    KERNELS.launch(prediction.device(), &name, Extent::threads(count[0] as u64), &arguments);
}
