//! Pixels to moments of latents.

use tch::Tensor;

use super::Levels;
use super::blocks::{Middle, Residual, norm};
use crate::autoencoder::{Network, Tile, Tiles};
use crate::nn::convolution::Convolution;
use crate::nn::norm::GroupNorm;
use crate::nn::{Builder, ParamSet, Rows, Views};

/// Residual blocks at one size of the picture, then half the sides, except at the last size.
struct Level {
    residuals: Vec<Residual>,
    halving: Option<Convolution>,
}

/// Makes the means and the logarithms of the variances of latents.
pub struct Encoder {
    params: ParamSet,
    space: i64,
    first: Convolution,
    levels: Vec<Level>,
    middle: Middle,
    norm: GroupNorm,
    output: Convolution,
    last: Option<Convolution>,
}

impl Encoder {
    pub fn new(sizes: &Levels) -> Self {
        let mut params = ParamSet::new("encoder");
        let mut root = Builder::new(&mut params, "", Rows::Image);
        let mut builder = root.at("encoder");
        let (narrow, wide) = (sizes.widths[0], sizes.widths[sizes.widths.len() - 1]);
        let first = Convolution::new(&mut builder.at("conv_in"), sizes.pixels, narrow, 3);
        let levels = (0..sizes.widths.len())
            .map(|index| level(&mut builder.at(&format!("down_blocks.{index}")), index, sizes))
            .collect();
        let middle = Middle::new(&mut builder.at("mid_block"), wide, sizes);
        let norm = norm(&mut builder.at("conv_norm_out"), wide, sizes);
        let moments = 2 * sizes.latents;
        let output = Convolution::new(&mut builder.at("conv_out"), wide, moments, 3);
        let last = sizes
            .has_last
            .then(|| Convolution::new(&mut root.at("quant_conv"), moments, moments, 1));
        Encoder { params, space: sizes.space(), first, levels, middle, norm, output, last }
    }
}

fn level(builder: &mut Builder<'_>, index: usize, sizes: &Levels) -> Level {
    let (inputs, outputs) = (sizes.widths[index.saturating_sub(1)], sizes.widths[index]);
    let residuals = Residual::several(builder, sizes.blocks, inputs, outputs, sizes);
    let halving = (index + 1 < sizes.widths.len())
        .then(|| Convolution::new(&mut builder.at("downsamplers.0.conv"), outputs, outputs, 3));
    Level { residuals, halving }
}

impl Network for Encoder {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    /// # Shapes
    /// `input`: pixels `[B, 3, H, W]`. Returns moments `[B, 2C, H/s, W/s]`.
    fn forward(&self, params: &Views, input: &Tensor) -> Tensor {
        let mut x = self.first.forward(params, input);
        for level in &self.levels {
            for residual in &level.residuals {
                x = residual.forward(params, &x);
            }
            if let Some(halving) = &level.halving {
                x = halving.halve(params, &x);
            }
        }
        x = self.middle.forward(params, &x);
        x = self.output.forward(params, &self.norm.forward(params, &x).silu());
        match &self.last {
            Some(last) => last.forward(params, &x),
            None => x,
        }
    }

    fn tiles(&self, tile: Tile) -> Tiles {
        Tiles::of_pixels(tile, self.space)
    }
}
