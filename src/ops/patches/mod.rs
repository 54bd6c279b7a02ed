//! Latents cut into blocks of frames, rows and columns, one token a block, and back: every number
//! moves once.
//!
//! libtorch copies a permuted view in runs as short as a patch is wide, and spends more on finding
//! each run than on its numbers.

mod cpu;
mod cuda;
mod places;
mod plain;

use tch::{Kind, Tensor};

use super::launch::KernelFile;
use super::{Bytes, Case, Misfit, Operation, Pass, bytes, drawn};
use places::Places;

/// Frames, rows and columns of a patch.
pub type Patch = [i64; 3];

/// Order of the features of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureOrder {
    /// Channel, frame, row, column.
    ChannelFirst,
    /// Frame, row, column, channel.
    ChannelLast,
}

/// Tokens along frames, rows and columns of latents `[B, C, F, H, W]`.
pub fn grid(latents: &Tensor, patch: Patch) -> [i64; 3] {
    let (_, _, frames, height, width) = latents.size5().expect("[B, C, F, H, W]");
    [frames / patch[0], height / patch[1], width / patch[2]]
}

/// Latents cut into patches.
///
/// # Shapes
/// `latents`: `[B, C, F, H, W]`, of which `patch` divides the last three. Returns `[B, L, C · pt ·
/// ph · pw]`, tokens in the order frame, row, column, features in the order channel, frame, row,
/// column.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub patch: Patch,
}

/// Tokens joined to latents: the inverse of [`Cut`] for features with the channel first.
///
/// # Shapes
/// `tokens`: `[B, L, C · pt · ph · pw]`, L tokens on `grid`. Returns `[B, C, F, H, W]`.
#[derive(Clone, Copy, Debug)]
pub struct Join {
    pub patch: Patch,
    /// Tokens along frames, rows and columns.
    pub grid: [i64; 3],
    pub order: FeatureOrder,
}

impl Operation<1> for Cut {
    const NAME: &'static str = "cut";
    type Saved = Places;

    fn plain(&self, [latents]: [&Tensor; 1]) -> Tensor {
        plain::cut(*self, latents)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, _pass: Pass, [latents]: [&Tensor; 1]) -> Result<(), Misfit> {
        let (_, _, frames, height, width) = latents.size5().map_err(|_| Misfit::Shape)?;
        let mut sides = [frames, height, width].into_iter().zip(self.patch);
        if sides.all(|(side, part)| side % part == 0) { Ok(()) } else { Err(Misfit::Shape) }
    }

    fn forward(&self, pass: Pass, [latents]: [Tensor; 1]) -> (Tensor, Places) {
        let places = Places::of_latents(&latents, *self);
        let tokens = match pass {
            Pass::Cpu => cpu::cut(&latents, places),
            Pass::Cuda => cuda::cut(&latents, places),
        };
        (tokens, places)
    }

    fn backward(&self, pass: Pass, places: Places, grad_output: Tensor) -> [Tensor; 1] {
        [match pass {
            Pass::Cpu => cpu::join(&grad_output, places),
            Pass::Cuda => cuda::join(&grad_output, places),
        }]
    }

    fn least_bytes(&self, [latents]: [&Tensor; 1]) -> Bytes {
        let moved = bytes([latents, latents]);
        Bytes { forward: moved, backward: moved }
    }

    fn cases() -> Vec<Case<Self, 1>> {
        let case = |kind, patch: Patch| {
            let [frames, rows, columns] = std::array::from_fn(|axis| GRID[axis] * patch[axis]);
            let inputs = [drawn(&[2, 5, frames, rows, columns], kind, 0)];
            Case { operation: Cut { patch }, inputs, tolerance: 0.0 }
        };
        kinds_and_patches().map(|(kind, patch)| case(kind, patch)).collect()
    }
}

impl Operation<1> for Join {
    const NAME: &'static str = "join";
    type Saved = Places;

    fn plain(&self, [tokens]: [&Tensor; 1]) -> Tensor {
        plain::join(*self, tokens)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, _pass: Pass, [tokens]: [&Tensor; 1]) -> Result<(), Misfit> {
        let (_, length, features) = tokens.size3().map_err(|_| Misfit::Shape)?;
        let tokens: i64 = self.grid.iter().product();
        let numbers: i64 = self.patch.iter().product();
        if length == tokens && features % numbers == 0 { Ok(()) } else { Err(Misfit::Shape) }
    }

    fn forward(&self, pass: Pass, [tokens]: [Tensor; 1]) -> (Tensor, Places) {
        let places = Places::of_tokens(&tokens, *self);
        let latents = match pass {
            Pass::Cpu => cpu::join(&tokens, places),
            Pass::Cuda => cuda::join(&tokens, places),
        };
        (latents, places)
    }

    fn backward(&self, pass: Pass, places: Places, grad_output: Tensor) -> [Tensor; 1] {
        [match pass {
            Pass::Cpu => cpu::cut(&grad_output, places),
            Pass::Cuda => cuda::cut(&grad_output, places),
        }]
    }

    fn least_bytes(&self, [tokens]: [&Tensor; 1]) -> Bytes {
        let moved = bytes([tokens, tokens]);
        Bytes { forward: moved, backward: moved }
    }

    fn cases() -> Vec<Case<Self, 1>> {
        let case = |kind, patch: Patch, order| {
            let features = 5 * patch.iter().product::<i64>();
            let inputs = [drawn(&[2, GRID.iter().product(), features], kind, 1)];
            Case { operation: Join { patch, grid: GRID, order }, inputs, tolerance: 0.0 }
        };
        kinds_and_patches()
            .flat_map(|(kind, patch)| {
                [FeatureOrder::ChannelFirst, FeatureOrder::ChannelLast]
                    .map(|order| case(kind, patch, order))
            })
            .collect()
    }
}

/// Tokens of the drawn latents.
const GRID: [i64; 3] = [2, 3, 4];

/// Runs of two numbers, of several and of one.
fn kinds_and_patches() -> impl Iterator<Item = (Kind, Patch)> {
    let kinds = [Kind::Float, Kind::BFloat16].into_iter();
    kinds.flat_map(|kind| [[2, 3, 2], [1, 2, 3], [1, 1, 1]].map(|patch| (kind, patch)))
}
