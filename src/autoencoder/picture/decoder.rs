//! Latents to pixels.

use tch::Tensor;

use super::Levels;
use super::blocks::{Middle, Residual, norm};
use crate::autoencoder::{Network, Tile, Tiles};
use crate::nn::convolution::{Convolution, doubled};
use crate::nn::norm::GroupNorm;
use crate::nn::{Builder, ParamSet, Rows, Views};

/// Residual blocks at one size of the picture, then twice the sides, except at the last size.
struct Level {
    residuals: Vec<Residual>,
    after_doubling: Option<Convolution>,
}

/// Makes pixels.
pub struct Decoder {
    params: ParamSet,
    space: i64,
    first: Option<Convolution>,
    input: Convolution,
    middle: Middle,
    levels: Vec<Level>,
    norm: GroupNorm,
    output: Convolution,
}

impl Decoder {
    pub fn new(sizes: &Levels) -> Self {
        let mut params = ParamSet::new("decoder");
        let mut root = Builder::new(&mut params, "", Rows::Image);
        let first = sizes.has_last.then(|| {
            Convolution::new(&mut root.at("post_quant_conv"), sizes.latents, sizes.latents, 1)
        });
        let mut builder = root.at("decoder");
        let (narrow, wide) = (sizes.widths[0], sizes.widths[sizes.widths.len() - 1]);
        let input = Convolution::new(&mut builder.at("conv_in"), sizes.latents, wide, 3);
        let middle = Middle::new(&mut builder.at("mid_block"), wide, sizes);
        let levels = (0..sizes.widths.len())
            .map(|index| level(&mut builder.at(&format!("up_blocks.{index}")), index, sizes))
            .collect();
        let norm = norm(&mut builder.at("conv_norm_out"), narrow, sizes);
        let output = Convolution::new(&mut builder.at("conv_out"), narrow, sizes.pixels, 3);
        Decoder { params, space: sizes.space(), first, input, middle, levels, norm, output }
    }
}

fn level(builder: &mut Builder<'_>, index: usize, sizes: &Levels) -> Level {
    let width = |index: usize| sizes.widths[sizes.widths.len() - 1 - index];
    let (inputs, outputs) = (width(index.saturating_sub(1)), width(index));
    let residuals = Residual::several(builder, sizes.blocks, inputs, outputs, sizes);
    let after_doubling = (index + 1 < sizes.widths.len())
        .then(|| Convolution::new(&mut builder.at("upsamplers.0.conv"), outputs, outputs, 3));
    Level { residuals, after_doubling }
}

impl Network for Decoder {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    /// # Shapes
    /// `input`: latents `[B, C, H, W]`. Returns pixels `[B, 3, s · H, s · W]`.
    fn forward(&self, params: &Views, input: &Tensor) -> Tensor {
        let mut x = match &self.first {
            Some(first) => first.forward(params, input),
            None => input.shallow_clone(),
        };
        x = self.middle.forward(params, &self.input.forward(params, &x));
        for level in &self.levels {
            for residual in &level.residuals {
                x = residual.forward(params, &x);
            }
            if let Some(convolution) = &level.after_doubling {
                x = convolution.forward(params, &doubled(&x));
            }
        }
        self.output.forward(params, &self.norm.forward(params, &x).silu())
    }

    fn tiles(&self, tile: Tile) -> Tiles {
        Tiles::of_latents(tile, self.space)
    }
}
