//! Rotary position embedding: neighbouring features turned as pairs.

pub mod cpu;
mod cuda;
mod plain;

use tch::{Kind, Tensor};

use super::launch::KernelFile;
use super::{Bytes, Case, Misfit, Operation, Pass, bytes, drawn};

/// Turns each pair of neighbouring features by the angle of its token; computed in f32 and rounded
/// once. The gradient is turned back.
///
/// # Shapes
/// `x`: `[B, L, N, E]`; `table`: `[L, 1, E/2]` of complex f32, one number of length 1 a token and
/// pair, a constant. Returns the shape and kind of `x`.
///
/// Source: Su et al. 2021, arXiv:2104.09864, section 3.2.
#[derive(Clone, Copy, Debug)]
pub struct Rotation;

/// Sense of a rotation.
#[derive(Clone, Copy)]
pub enum Direction {
    Forth,
    /// By the negative angles, as gradients are turned.
    Back,
}

impl Direction {
    /// Sign of the angles.
    fn sign(self) -> f32 {
        match self {
            Direction::Forth => 1.0,
            Direction::Back => -1.0,
        }
    }
}

impl Operation<2> for Rotation {
    const NAME: &'static str = "rotation";
    const CONSTANTS: [bool; 2] = [false, true];
    /// `table`.
    type Saved = Tensor;

    fn plain(&self, [x, table]: [&Tensor; 2]) -> Tensor {
        plain::rotation(x, table)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, _pass: Pass, [x, table]: [&Tensor; 2]) -> Result<(), Misfit> {
        let (_, tokens, _, width) = x.size4().map_err(|_| Misfit::Shape)?;
        if table.kind() != Kind::ComplexFloat {
            Err(Misfit::Kind)
        } else if table.size() != [tokens, 1, width / 2] || width % 2 != 0 {
            Err(Misfit::Shape)
        } else {
            Ok(())
        }
    }

    fn forward(&self, pass: Pass, [x, table]: [Tensor; 2]) -> (Tensor, Tensor) {
        let output = match pass {
            Pass::Cpu => cpu::turned(&x, &table, Direction::Forth),
            Pass::Cuda => cuda::turned(&x, &table, Direction::Forth),
        };
        (output, table)
    }

    fn backward(&self, pass: Pass, table: Tensor, grad_output: Tensor) -> [Tensor; 2] {
        let grad_x = match pass {
            Pass::Cpu => cpu::turned(&grad_output, &table, Direction::Back),
            Pass::Cuda => cuda::turned(&grad_output, &table, Direction::Back),
        };
        [grad_x, Tensor::new()]
    }

    fn least_bytes(&self, [x, table]: [&Tensor; 2]) -> Bytes {
        let moved = bytes([x, x, table]);
        Bytes { forward: moved, backward: moved }
    }

    fn cases() -> Vec<Case<Self, 2>> {
        let case = |kind, tolerance, width: i64| {
            let angles = drawn(&[5, 1, width / 2], Kind::Float, 2);
            let table = Tensor::complex(&angles.cos(), &angles.sin());
            let inputs = [drawn(&[2, 5, 3, width], kind, 1), table];
            Case { operation: Rotation, inputs, tolerance }
        };
        [(Kind::Float, 1e-6), (Kind::BFloat16, 4e-3)]
            .into_iter()
            .flat_map(|(kind, tolerance)| [2, 24, 64].map(|width| case(kind, tolerance, width)))
            .collect()
    }
}
