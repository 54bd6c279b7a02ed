//! Rotation by a kernel of a GPU.

use tch::Tensor;

use super::Direction;
use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, kernel_text, vector, word};

pub static KERNELS: KernelFile = KernelFile::new("rotation/kernel.cu", kernel_text!("kernel.cu"));

/// # Shapes
/// `x`: `[B, L, N, E]`; `table`: `[L, 1, E/2]` complex. Returns the shape of `x`.
pub fn turned(x: &Tensor, table: &Tensor, direction: Direction) -> Tensor {
    let (_, tokens, heads, width) = x.size4().expect("[B, L, N, E]");
    let (output, table) = (x.empty_like(), table.view_as_real());
    let numbers = vector(&[width], &[x, &table, &output], 2);
    let count = x.numel() as i64 / numbers;
    KERNELS.launch(
        x.device(),
        &format!("rotation_{}_{numbers}", word(x)),
        Extent::threads(count as u64),
        &[
            Argument::Tensor(x),
            Argument::Tensor(&table),
            Argument::Tensor(&output),
            Argument::Integers(&[count]),
            Argument::Integers(&[width]),
            Argument::Integers(&[heads * width]),
            Argument::Integers(&[tokens]),
            Argument::Numbers(&[direction.sign()]),
        ],
    );
    output
}
