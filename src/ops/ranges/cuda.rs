//! Ranges by kernels of a GPU, in two stages.

use tch::{Kind, Tensor};

use super::TENSORS;
use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, WARP, kernel_text, vector};

pub static KERNELS: KernelFile = KernelFile::new("ranges/kernel.cu", kernel_text!("kernel.cu"));

/// Warps of a block, which take parts of one tensor.
const WARPS: i64 = 8;
/// Numbers for which a tensor is cut into another [`WARPS`] parts, and most blocks of a tensor.
const NUMBERS_OF_A_BLOCK: u64 = 1 << 14;
const MOST_BLOCKS: u64 = 64;

pub fn ranges(tensors: [&Tensor; TENSORS]) -> Tensor {
    let [first, ..] = tensors;
    let floats = |shape: &[i64]| Tensor::empty(shape, (Kind::Float, first.device()));
    let length = first.numel() as i64;
    let blocks = length.unsigned_abs().div_ceil(NUMBERS_OF_A_BLOCK).min(MOST_BLOCKS) as i64;
    let tensor_count = TENSORS as i64;
    let partial = floats(&[2 * tensor_count, blocks * WARPS]);
    let is_whole = length % 8 == 0 && vector(&[length], &tensors, 1) > 1;
    let numbers = if is_whole { 8 } else { 1 };
    let narrow = tensors.map(|tensor| i64::from(tensor.kind() == Kind::BFloat16));
    let (count, parts) = ([length / numbers], [blocks * WARPS]);
    let tensors = tensors.into_iter().map(Argument::Tensor);
    let arguments: Vec<Argument<'_>> = tensors
        .chain([Argument::Tensor(&partial), Argument::Integers(&narrow)])
        .chain([Argument::Integers(&count), Argument::Integers(&parts)])
        .collect();
    let threads = WARPS as u32 * WARP as u32;
    let extent = Extent::blocks(tensor_count * blocks, threads);
    KERNELS.launch(first.device(), &format!("ranges_{numbers}"), extent, &arguments);
    let ranges = floats(&[2 * tensor_count]);
    KERNELS.launch(
        first.device(),
        "ranges_of_parts",
        Extent::blocks(2 * tensor_count, WARP as u32),
        &[Argument::Tensor(&partial), Argument::Tensor(&ranges), Argument::Integers(&parts)],
    );
    ranges
}
