//! Ranges by kernels of a GPU, in two stages.

use tch::{Kind, Tensor};

use super::TENSORS;
use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, WARP, kernel_text, vector};

pub static KERNELS: KernelFile = KernelFile::new("ranges/kernel.cu", kernel_text!("kernel.cu"));

/// Warps of a block, which take parts of one tensor.
const WARPS: i64 = 8;
/// Numbers for which a tensor gets another block, and most blocks of a tensor.
const NUMBERS_OF_A_BLOCK: u64 = 1 << 14;
const MOST_BLOCKS: u64 = 128;

pub fn ranges(tensors: [&Tensor; TENSORS]) -> Tensor {
    let parts = ranges_of_parts(tensors);
    let [rows, count] = parts.size()[..] else { unreachable!("[10, parts]") };
    let ranges = Tensor::empty([rows], (Kind::Float, parts.device()));
    KERNELS.launch(
        parts.device(),
        "ranges_of_tensors",
        Extent::blocks(rows, WARP as u32),
        &[Argument::Tensor(&parts), Argument::Tensor(&ranges), Argument::Integers(&[count])],
    );
    ranges
}

/// The least number of each part of the first tensor, then the greatest, and so on: `[10, parts]`.
fn ranges_of_parts(tensors: [&Tensor; TENSORS]) -> Tensor {
    let (device, length) = (tensors[0].device(), tensors[0].numel() as i64);
    let blocks = length.unsigned_abs().div_ceil(NUMBERS_OF_A_BLOCK).min(MOST_BLOCKS) as i64;
    let ranges = Tensor::empty([2 * TENSORS as i64, blocks * WARPS], (Kind::Float, device));
    let is_whole = length % 8 == 0 && vector(&[length], &tensors, 1) > 1;
    let numbers = if is_whole { 8 } else { 1 };
    let narrow = tensors.map(|tensor| i64::from(tensor.kind() == Kind::BFloat16));
    let (count, parts) = ([length / numbers], [blocks * WARPS]);
    let tensors = tensors.into_iter().map(Argument::Tensor);
    let arguments: Vec<Argument<'_>> = tensors
        .chain([Argument::Tensor(&ranges), Argument::Integers(&narrow)])
        .chain([Argument::Integers(&count), Argument::Integers(&parts)])
        .collect();
    let extent = Extent::blocks(TENSORS as i64 * blocks, WARPS as u32 * WARP as u32);
    KERNELS.launch(device, &format!("ranges_of_parts_{numbers}"), extent, &arguments);
    ranges
}
