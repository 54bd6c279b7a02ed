//! GELU and its gradient by kernels of a GPU.

use tch::Tensor;

use crate::ops::launch::{KernelFile, kernel_text, launch_rows, without_gaps};

pub static KERNELS: KernelFile = KernelFile::new("gelu_tanh/kernel.cu", kernel_text!("kernel.cu"));

pub fn forward(x: &Tensor) -> Tensor {
    let output = without_gaps(x);
    write(x, &output);
    output
}

/// Writes the output to rows that may lie apart.
pub fn write(x: &Tensor, output: &Tensor) {
    launch_rows(&KERNELS, "gelu_tanh", output, &[x, output]);
}

pub fn backward(x: &Tensor, grad_output: &Tensor) -> Tensor {
    let gradient = without_gaps(x);
    launch_rows(&KERNELS, "gelu_tanh_backward", grad_output, &[x, grad_output, &gradient]);
    gradient
}
