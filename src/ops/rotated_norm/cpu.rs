//! Normalization and rotation, each in one pass over a CPU's memory: a row stays in its cache.

use tch::Tensor;

use super::rows;
use crate::ops::RmsNorm;
use crate::ops::rms_norm::{Saved, cpu};
use crate::ops::rotation::Direction;
use crate::ops::rotation::cpu::turned;

pub fn forward(norm: RmsNorm, x: &Tensor, weight: &Tensor, table: &Tensor) -> Tensor {
    turned(&cpu::forward(norm, &rows(x, weight), weight).view_as(x), table, Direction::Forth)
}

/// Gradients of `x` and of the weight.
pub fn backward(norm: RmsNorm, saved: &Saved, table: &Tensor, grad_output: &Tensor) -> [Tensor; 2] {
    let Saved { x, weight } = saved;
    let grad_normalized = turned(grad_output, table, Direction::Back);
    let in_rows = Saved { x: rows(x, weight), weight: weight.shallow_clone() };
    let [grad_x, grad_weight] = cpu::backward(norm, &in_rows, &rows(&grad_normalized, weight));
    [grad_x.view_as(x), grad_weight]
}
