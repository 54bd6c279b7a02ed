//! The gate and its gradients by kernels of a GPU.

use tch::Tensor;

use super::{half_of, width};
use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, kernel_text, pitch, vector, without_gaps, word};

pub static KERNELS: KernelFile = KernelFile::new("silu_gate/kernel.cu", kernel_text!("kernel.cu"));

pub fn forward(x: &Tensor) -> Tensor {
    let output = half_of(x);
    launch("silu_gate", x, &[&output]);
    output
}

pub fn backward(x: &Tensor, grad_output: &Tensor) -> Tensor {
    let gradient = without_gaps(x);
    launch("silu_gate_backward", x, &[grad_output, &gradient]);
    gradient
}

/// The first of `others` has a number for each one of the output.
fn launch(name: &str, x: &Tensor, others: &[&Tensor]) {
    let (width, pitch) = (width(x), pitch(x, 1));
    let tensors: Vec<&Tensor> = [x].iter().chain(others).copied().collect();
    let numbers = vector(&[width, pitch], &tensors, 1);
    let count = others[0].numel() as i64 / numbers;
    let sizes = [[count], [width], [pitch]];
    let arguments: Vec<Argument<'_>> = [Argument::Rows(x)]
        .into_iter()
        .chain(others.iter().map(|tensor| Argument::Tensor(tensor)))
        .chain(sizes.iter().map(|size| Argument::Integers(size)))
        .collect();
    let name = format!("{name}_{}_{numbers}", word(x));
    KERNELS.launch(x.device(), &name, Extent::threads(count as u64), &arguments);
}
