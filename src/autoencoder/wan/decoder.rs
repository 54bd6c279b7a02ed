//! Latents to pixels.

use tch::Tensor;

use super::blocks::{Doubling, Middle, OF_VIDEO, Residual, cube, point};
use super::shortcut::Repeated;
use super::{Sizes, pixels_of};
use crate::autoencoder::{Network, Tile, Tiles};
use crate::nn::convolution::{CausalConvolution, History};
use crate::nn::norm::ChannelNorm;
use crate::nn::{Builder, ParamSet, Rows, Views};

/// Residual blocks at one size, then twice the sides, except at the last size.
struct Level {
    residuals: Vec<Residual>,
    doubling: Option<Doubling>,
    shortcut: Option<Repeated>,
}

impl Level {
    fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let mut y = x.shallow_clone();
        for residual in &self.residuals {
            y = residual.forward(params, &y, history);
        }
        if let Some(doubling) = &self.doubling {
            y = doubling.forward(params, &y, history);
        }
        match &self.shortcut {
            Some(shortcut) => y + shortcut.forward(x, history),
            None => y,
        }
    }
}

/// Makes pixels.
pub struct Decoder {
    params: ParamSet,
    sizes: Sizes,
    first: CausalConvolution,
    input: CausalConvolution,
    middle: Middle,
    levels: Vec<Level>,
    norm: ChannelNorm,
    output: CausalConvolution,
}

impl Decoder {
    pub fn new(sizes: &Sizes) -> Self {
        let mut params = ParamSet::new("decoder");
        let mut root = Builder::new(&mut params, "", Rows::Image);
        let first = point(&mut root.at("post_quant_conv"), sizes.latents, sizes.latents);
        let mut builder = root.at("decoder");
        let widths = sizes.widths();
        let (narrow, wide) = (widths[0], widths[widths.len() - 1]);
        let input = cube(&mut builder.at("conv_in"), sizes.latents, wide);
        let middle = Middle::new(&mut builder.at("mid_block"), wide);
        let mut levels: Vec<Level> = Vec::new();
        let mut inputs = wide;
        for (index, outputs) in widths.iter().rev().enumerate() {
            let builder = &mut builder.at(&format!("up_blocks.{index}"));
            levels.push(level(builder, index, [inputs, *outputs], sizes));
            // Without a shortcut, doubling the sides halves the channels.
            inputs = if sizes.is_residual { *outputs } else { outputs / 2 };
        }
        let norm = ChannelNorm::new(&mut builder.at("norm_out"), narrow, OF_VIDEO);
        let output = cube(&mut builder.at("conv_out"), narrow, sizes.pixels);
        Decoder { params, sizes: sizes.clone(), first, input, middle, levels, norm, output }
    }

    fn chunk(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let mut x = self.input.forward(params, x, history);
        x = self.middle.forward(params, &x, history);
        for level in &self.levels {
            x = level.forward(params, &x, history);
        }
        self.output.forward(params, &self.norm.forward(params, &x).silu(), history)
    }
}

fn level(
    builder: &mut Builder<'_>,
    index: usize,
    [inputs, outputs]: [i64; 2],
    sizes: &Sizes,
) -> Level {
    let names = (0..sizes.blocks).map(|number| format!("resnets.{number}"));
    let residuals = Residual::several(builder, names, inputs, outputs);
    let last = sizes.halves_time.len();
    if index == last {
        return Level { residuals, doubling: None, shortcut: None };
    }
    let doubles_time = sizes.halves_time[last - 1 - index];
    let (name, channels) = match sizes.is_residual {
        true => ("upsampler", [outputs, outputs]),
        false => ("upsamplers.0", [outputs, outputs / 2]),
    };
    let doubling = Some(Doubling::new(&mut builder.at(name), channels, doubles_time));
    let block = sizes.block(last - 1 - index);
    let shortcut = sizes.is_residual.then(|| Repeated::new(inputs, outputs, block));
    Level { residuals, doubling, shortcut }
}

impl Network for Decoder {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    /// # Shapes
    /// `input`: latents `[B, C, F, H, W]`. Returns patches of pixels as channels, `[B, 3p², 1 + 4(F
    /// - 1), s · H, s · W]`.
    fn forward(&self, params: &Views, input: &Tensor) -> Tensor {
        let (mut history, mut pixels) = (History::default(), Vec::new());
        let latents = self.first.forward(params, input, &mut history);
        for frame in 0..latents.size()[2] {
            pixels.push(self.chunk(params, &latents.narrow(2, frame, 1), &mut history));
            history.end_chunk();
        }
        Tensor::cat(&pixels, 2)
    }

    /// Returns pixels of their patches, kept within -1 and 1.
    fn finish(&self, output: Tensor) -> Tensor {
        pixels_of(&output, self.sizes.patch).clamp(-1.0, 1.0)
    }

    fn tiles(&self, tile: Tile) -> Tiles {
        let Sizes { patch, .. } = self.sizes;
        let space = self.sizes.space() * patch;
        Tiles {
            output_side: tile.side / patch,
            output_stride: tile.stride / patch,
            ..Tiles::of_latents(tile, space)
        }
    }
}
