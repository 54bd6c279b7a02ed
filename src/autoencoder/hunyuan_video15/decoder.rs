//! Latents to pixels.

use tch::Tensor;

use super::blocks::{AXES, Middle, Residual};
use super::resampling::{Doubling, repeated};
use super::{LevelSizes, Sizes};
use crate::autoencoder::{Network, Tile, Tiles};
use crate::nn::convolution::EdgeConvolution;
use crate::nn::norm::ChannelNorm;
use crate::nn::{Builder, ParamSet, Rows, Views};

/// Residual blocks at one size, then twice the sides, except at the last size.
struct Level {
    residuals: Vec<Residual>,
    doubling: Option<Doubling>,
}

/// Makes pixels.
pub struct Decoder {
    params: ParamSet,
    space: i64,
    input: EdgeConvolution,
    middle: Middle,
    levels: Vec<Level>,
    norm: ChannelNorm,
    output: EdgeConvolution,
    width: i64,
}

impl Decoder {
    /// `space`: pixels along the side of a latent.
    pub fn new(sizes: &Sizes, space: i64) -> Self {
        let mut params = ParamSet::new("decoder");
        let mut builder = Builder::new(&mut params, "decoder", Rows::Image);
        let (width, narrow) = (sizes.levels[0].inputs, sizes.last_width());
        let input = EdgeConvolution::new(&mut builder.at("conv_in.conv"), sizes.inputs, width);
        let middle = Middle::new(&mut builder.at("mid_block"), width);
        let levels = sizes.levels.iter().enumerate().map(|(index, level)| {
            let builder = &mut builder.at(&format!("up_blocks.{index}"));
            let LevelSizes { inputs, width, change } = *level;
            let residuals = Residual::several(builder, sizes.blocks, inputs, width);
            let doubling = change.map(|change| {
                Doubling::new(&mut builder.at("upsamplers.0.conv.conv"), width, change)
            });
            Level { residuals, doubling }
        });
        let levels = levels.collect();
        let norm = ChannelNorm::new(&mut builder.at("norm_out"), narrow, AXES);
        let output = EdgeConvolution::new(&mut builder.at("conv_out.conv"), narrow, sizes.outputs);
        Decoder { params, space, input, middle, levels, norm, output, width }
    }
}

impl Network for Decoder {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    /// # Shapes
    /// `input`: latents `[B, C, F, H, W]`. Returns pixels `[B, 3, 1 + t · (F - 1), s · H, s · W]`.
    fn forward(&self, params: &Views, input: &Tensor) -> Tensor {
        let mut x = self.input.forward(params, input) + repeated(input, self.width);
        x = self.middle.forward(params, &x);
        for level in &self.levels {
            for residual in &level.residuals {
                x = residual.forward(params, &x);
            }
            if let Some(doubling) = &level.doubling {
                x = doubling.forward(params, &x);
            }
        }
        self.output.forward(params, &self.norm.forward(params, &x).silu())
    }

    fn tiles(&self, tile: Tile) -> Tiles {
        Tiles::of_latents(tile, self.space)
    }
}
