//! Places between which a cut or a join moves numbers.

use tch::Tensor;

use super::{Cut, FeatureOrder, Join, Patch, grid};

/// Places of each number in latents and in tokens.
#[derive(Clone, Copy)]
pub struct Places {
    pub batch: usize,
    pub channels: usize,
    /// Tokens along frames, rows and columns.
    pub grid: [usize; 3],
    pub patch: [usize; 3],
    /// From a feature to that of the next channel, frame, row and column.
    pub strides: [usize; 4],
}

impl Places {
    /// Places that a cut of `latents` `[B, C, F, H, W]` moves numbers between.
    pub fn of_latents(latents: &Tensor, Cut { patch }: Cut) -> Self {
        let (batch, channels) = (latents.size()[0], latents.size()[1]);
        Self::new(batch, channels, grid(latents, patch), patch, FeatureOrder::ChannelFirst)
    }

    /// Places that a join of `tokens` `[B, L, C · pt · ph · pw]` moves numbers between.
    pub fn of_tokens(tokens: &Tensor, Join { patch, grid, order }: Join) -> Self {
        let channels = tokens.size()[2] / patch.iter().product::<i64>();
        Self::new(tokens.size()[0], channels, grid, patch, order)
    }

    fn new(batch: i64, channels: i64, grid: [i64; 3], patch: Patch, order: FeatureOrder) -> Self {
        let (batch, channels) = (batch as usize, channels as usize);
        let (grid, patch) = (grid.map(|tokens| tokens as usize), patch.map(|side| side as usize));
        let [pt, ph, pw] = patch;
        let strides = match order {
            FeatureOrder::ChannelFirst => [pt * ph * pw, ph * pw, pw, 1],
            FeatureOrder::ChannelLast => [1, ph * pw * channels, pw * channels, channels],
        };
        Places { batch, channels, grid, patch, strides }
    }

    pub fn features(&self) -> usize {
        self.channels * self.patch.iter().product::<usize>()
    }

    /// `[B, L, C · pt · ph · pw]`.
    pub fn shape_of_tokens(&self) -> [i64; 3] {
        [self.batch, self.grid.iter().product(), self.features()].map(|size| size as i64)
    }

    /// `[B, C, F, H, W]`.
    pub fn shape_of_latents(&self) -> [i64; 5] {
        let ([frames, rows, columns], [pt, ph, pw]) = (self.grid, self.patch);
        let shape = [self.batch, self.channels, frames * pt, rows * ph, columns * pw];
        shape.map(|size| size as i64)
    }

    /// The kernels' `Places`.
    pub fn numbers(&self) -> [i64; 12] {
        let Places { batch, channels, grid: [f, h, w], patch: [pt, ph, pw], strides } = *self;
        let [to_channel, to_frame, to_row, to_column] = strides;
        [batch, channels, f, h, w, pt, ph, pw, to_channel, to_frame, to_row, to_column]
            .map(|number| number as i64)
    }
}
