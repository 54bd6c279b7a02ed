//! GELU and its gradient by kernels of a GPU.

use tch::Tensor;

use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, kernel_text, vector, word};

pub static KERNELS: KernelFile = KernelFile::new("gelu_tanh/kernel.cu", kernel_text!("kernel.cu"));

pub fn forward(x: &Tensor) -> Tensor {
    let output = x.empty_like();
    launch("gelu_tanh", &[x, &output]);
    output
}

pub fn backward(x: &Tensor, grad_output: &Tensor) -> Tensor {
    let gradient = x.empty_like();
    launch("gelu_tanh_backward", &[x, grad_output, &gradient]);
    gradient
}

fn launch(name: &str, tensors: &[&Tensor]) {
    let x = tensors[0];
    let numbers = vector(&[x.numel() as i64], tensors, 1);
    let count = [x.numel() as i64 / numbers];
    let arguments: Vec<Argument<'_>> = tensors
        .iter()
        .map(|tensor| Argument::Tensor(tensor))
        .chain([Argument::Integers(&count)])
        .collect();
    let name = format!("{name}_{}_{numbers}", word(x));
    KERNELS.launch(x.device(), &name, Extent::threads(count[0] as u64), &arguments);
}
