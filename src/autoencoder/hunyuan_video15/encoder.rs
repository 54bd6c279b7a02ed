//! Pixels to moments of latents.

use tch::Tensor;

use super::blocks::{AXES, Middle, Residual};
use super::resampling::{Halving, averaged};
use super::{LevelSizes, Sizes};
use crate::autoencoder::{Network, Tile, Tiles};
use crate::nn::convolution::EdgeConvolution;
use crate::nn::norm::ChannelNorm;
use crate::nn::{Builder, ParamSet, Rows, Views};

/// Residual blocks at one size, then half the sides, except at the last size.
struct Level {
    residuals: Vec<Residual>,
    halving: Option<Halving>,
}

/// Makes the means and the logarithms of the variances of latents.
pub struct Encoder {
    params: ParamSet,
    space: i64,
    input: EdgeConvolution,
    levels: Vec<Level>,
    middle: Middle,
    norm: ChannelNorm,
    output: EdgeConvolution,
    moments: i64,
}

impl Encoder {
    /// `space`: pixels along the side of a latent.
    pub fn new(sizes: &Sizes, space: i64) -> Self {
        let mut params = ParamSet::new("encoder");
        let mut builder = Builder::new(&mut params, "encoder", Rows::Image);
        let (wide, moments) = (sizes.last_width(), sizes.outputs);
        let input = &mut builder.at("conv_in.conv");
        let input = EdgeConvolution::new(input, sizes.inputs, sizes.levels[0].inputs);
        let levels = sizes.levels.iter().enumerate().map(|(index, level)| {
            let builder = &mut builder.at(&format!("down_blocks.{index}"));
            let LevelSizes { inputs, width, change } = *level;
            let residuals = Residual::several(builder, sizes.blocks, inputs, width);
            let halving = change.map(|change| {
                Halving::new(&mut builder.at("downsamplers.0.conv.conv"), width, change)
            });
            Level { residuals, halving }
        });
        let levels = levels.collect();
        let middle = Middle::new(&mut builder.at("mid_block"), wide);
        let norm = ChannelNorm::new(&mut builder.at("norm_out"), wide, AXES);
        let output = EdgeConvolution::new(&mut builder.at("conv_out.conv"), wide, moments);
        Encoder { params, space, input, levels, middle, norm, output, moments }
    }
}

impl Network for Encoder {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    /// # Shapes
    /// `input`: pixels `[B, 3, F, H, W]`. Returns moments `[B, 2C, 1 + (F - 1)/t, H/s, W/s]`.
    fn forward(&self, params: &Views, input: &Tensor) -> Tensor {
        let mut x = self.input.forward(params, input);
        for level in &self.levels {
            for residual in &level.residuals {
                x = residual.forward(params, &x);
            }
            if let Some(halving) = &level.halving {
                x = halving.forward(params, &x);
            }
        }
        x = self.middle.forward(params, &x);
        let moments = self.output.forward(params, &self.norm.forward(params, &x).silu());
        moments + averaged(&x, self.moments)
    }

    fn tiles(&self, tile: Tile) -> Tiles {
        Tiles::of_pixels(tile, self.space)
    }
}
