//! Patches cut and joined by kernels of a GPU.

use tch::Tensor;

use super::Places;
use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, kernel_text, word};

pub static KERNELS: KernelFile = KernelFile::new("patches/kernel.cu", kernel_text!("kernel.cu"));

/// Tokens of latents.
pub fn cut(latents: &Tensor, places: Places) -> Tensor {
    moved(
        "cut",
        latents,
        Tensor::empty(places.shape_of_tokens(), (latents.kind(), latents.device())),
        places,
    )
}

/// Latents of tokens.
pub fn join(tokens: &Tensor, places: Places) -> Tensor {
    moved(
        "join",
        tokens,
        Tensor::empty(places.shape_of_latents(), (tokens.kind(), tokens.device())),
        places,
    )
}

fn moved(name: &str, from: &Tensor, into: Tensor, places: Places) -> Tensor {
    KERNELS.launch(
        from.device(),
        &format!("{name}_{}", word(from)),
        Extent::threads(from.numel() as u64),
        &[
            Argument::Tensor(from),
            Argument::Tensor(&into),
            Argument::Integers(&[from.numel() as i64]),
            Argument::Integers(&places.numbers()),
        ],
    );
    into
}
