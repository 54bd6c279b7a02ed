//! Noising by kernels of a GPU.

use tch::Tensor;

use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, kernel_text, vector, word};

pub static KERNELS: KernelFile = KernelFile::new("noising/kernel.cu", kernel_text!("kernel.cu"));

pub fn noising(data: &Tensor, noise: &Tensor, sigma: &Tensor) -> Tensor {
    let output = data.empty_like();
    let of_sample = (data.numel() / sigma.numel()) as i64;
    let numbers = vector(&[of_sample], &[data, noise, &output], 1);
    let count = data.numel() as i64 / numbers;
    KERNELS.launch(
        data.device(),
        &format!("noising_{}_{numbers}", word(data)),
        Extent::threads(count as u64),
        &[
            Argument::Tensor(data),
            Argument::Tensor(noise),
            Argument::Tensor(sigma),
            Argument::Tensor(&output),
            Argument::Integers(&[count]),
            Argument::Integers(&[of_sample]),
        ],
    );
    output
}
