//! Gated residual and its gradients by kernels of a GPU.

use tch::{Kind, Tensor};

use super::Saved;
use crate::cuda::Argument;
use crate::ops::launch::{Extent, KernelFile, column_sums, kernel_text, pitch, vector, word};
use crate::ops::modulation::{row_width, sharing};

pub static KERNELS: KernelFile =
    KernelFile::new("gated_residual/kernel.cu", kernel_text!("kernel.cu"));

/// Threads of a block that sums columns over rows, and rows of its block.
const THREADS: u32 = 128;
const ROWS: i64 = 32;

pub fn forward(x: &Tensor, gate: &Tensor, change: &Tensor) -> Tensor {
    let output = x.empty_like();
    let (width, pitch) = (row_width(x), pitch(gate, 1));
    let numbers = vector(&[width, pitch], &[x, gate, change, &output], 1);
    let count = x.numel() as i64 / numbers;
    KERNELS.launch(
        x.device(),
        &format!("gated_residual_{}_{}_{numbers}", word(x), word(gate)),
        Extent::threads(count as u64),
        &[
            Argument::Tensor(x),
            Argument::Rows(gate),
            Argument::Tensor(change),
            Argument::Tensor(&output),
            Argument::Integers(&[count]),
            Argument::Integers(&[width]),
            Argument::Integers(&[sharing(x, gate)]),
            Argument::Integers(&[pitch]),
        ],
    );
    output
}

/// Gradients of gate and change.
pub fn backward(saved: &Saved, grad_output: &Tensor) -> [Tensor; 2] {
    let Saved { gate, change } = saved;
    let grad_change = change.empty_like();
    let (width, sharing, pitch) = (row_width(change), sharing(change, gate), pitch(gate, 1));
    let gates = gate.numel() as i64 / width;
    let blocks = sharing.unsigned_abs().div_ceil(ROWS as u64) as i64;
    let partial = Tensor::empty([gates, blocks, width], (Kind::Float, change.device()));
    let numbers = vector(&[width, pitch], &[change, gate, grad_output, &grad_change], 1);
    let tiles = ((width / numbers) as u64).div_ceil(THREADS.into()) as i64;
    KERNELS.launch(
        change.device(),
        &format!("gated_residual_backward_{}_{}_{numbers}", word(change), word(gate)),
        Extent::blocks(gates * blocks * tiles, THREADS),
        &[
            Argument::Tensor(change),
            Argument::Rows(gate),
            Argument::Tensor(grad_output),
            Argument::Tensor(&grad_change),
            Argument::Tensor(&partial),
            Argument::Integers(&[width]),
            Argument::Integers(&[sharing]),
            Argument::Integers(&[pitch]),
            Argument::Integers(&[ROWS]),
        ],
    );
    [column_sums(&partial, gates, gate.kind()).view_as(gate), grad_change]
}
