//! Pixels to moments of latents.

use tch::Tensor;

use super::blocks::{Halving, Middle, OF_VIDEO, Residual, cube, point};
use super::shortcut::Averaged;
use super::{CHUNK, Sizes, patches_of};
use crate::autoencoder::{Network, Tile, Tiles};
use crate::nn::convolution::{CausalConvolution, History};
use crate::nn::norm::ChannelNorm;
use crate::nn::{Builder, ParamSet, Rows, Views};

/// Residual blocks at one size, then half the sides, except at the last size.
struct Level {
    residuals: Vec<Residual>,
    halving: Option<Halving>,
    shortcut: Option<Averaged>,
}

impl Level {
    fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let mut y = x.shallow_clone();
        for residual in &self.residuals {
            y = residual.forward(params, &y, history);
        }
        if let Some(halving) = &self.halving {
            y = halving.forward(params, &y, history);
        }
        match &self.shortcut {
            Some(shortcut) => y + shortcut.forward(x),
            None => y,
        }
    }
}

/// Makes the means and the logarithms of the variances of latents.
pub struct Encoder {
    params: ParamSet,
    sizes: Sizes,
    input: CausalConvolution,
    levels: Vec<Level>,
    middle: Middle,
    norm: ChannelNorm,
    output: CausalConvolution,
    last: CausalConvolution,
}

impl Encoder {
    pub fn new(sizes: &Sizes) -> Self {
        let mut params = ParamSet::new("encoder");
        let mut root = Builder::new(&mut params, "", Rows::Image);
        let mut builder = root.at("encoder");
        let (widths, moments) = (sizes.widths(), 2 * sizes.latents);
        let wide = widths[widths.len() - 1];
        // At full size the first residual block has as many inputs as there are at no multiple.
        let input = cube(&mut builder.at("conv_in"), sizes.pixels, sizes.base);
        let inputs = [sizes.base].into_iter().chain(widths.iter().copied());
        let mut names = Names { is_residual: sizes.is_residual, next: 0 };
        let levels = (0..).zip(inputs.zip(&widths)).map(|(index, (inputs, outputs))| {
            level(&mut builder.at("down_blocks"), &mut names, index, [inputs, *outputs], sizes)
        });
        let levels = levels.collect();
        let middle = Middle::new(&mut builder.at("mid_block"), wide);
        let norm = ChannelNorm::new(&mut builder.at("norm_out"), wide, OF_VIDEO);
        let output = cube(&mut builder.at("conv_out"), wide, moments);
        let last = point(&mut root.at("quant_conv"), moments, moments);
        Encoder { params, sizes: sizes.clone(), input, levels, middle, norm, output, last }
    }

    fn chunk(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let mut x = self.input.forward(params, x, history);
        for level in &self.levels {
            x = level.forward(params, &x, history);
        }
        x = self.middle.forward(params, &x, history);
        self.output.forward(params, &self.norm.forward(params, &x).silu(), history)
    }
}

/// Names of a level's parts: numbered within the level where it has a shortcut, else through all
/// levels.
struct Names {
    is_residual: bool,
    next: usize,
}

impl Names {
    fn residual(&mut self, level: usize, index: i64) -> String {
        if self.is_residual { format!("{level}.resnets.{index}") } else { self.numbered() }
    }

    fn halving(&mut self, level: usize) -> String {
        if self.is_residual { format!("{level}.downsampler") } else { self.numbered() }
    }

    fn numbered(&mut self) -> String {
        self.next += 1;
        (self.next - 1).to_string()
    }
}

fn level(
    builder: &mut Builder<'_>,
    names: &mut Names,
    index: usize,
    [inputs, outputs]: [i64; 2],
    sizes: &Sizes,
) -> Level {
    let residuals = (0..sizes.blocks).map(|number| names.residual(index, number));
    let residuals = Residual::several(builder, residuals, inputs, outputs);
    let halving = sizes.halves_time.get(index).map(|halves_time| {
        Halving::new(&mut builder.at(&names.halving(index)), outputs, *halves_time)
    });
    let shortcut = sizes.is_residual.then(|| Averaged::new(outputs, sizes.block(index)));
    Level { residuals, halving, shortcut }
}

impl Network for Encoder {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn prepare(&self, input: &Tensor) -> Tensor {
        patches_of(input, self.sizes.patch)
    }

    /// # Shapes
    /// `input`: patches of pixels. Returns moments `[B, 2C, 1 + (F - 1)/4, H/s, W/s]`.
    fn forward(&self, params: &Views, input: &Tensor) -> Tensor {
        let (frames, mut history, mut moments) = (input.size()[2], History::default(), Vec::new());
        let later = (1..frames).step_by(CHUNK as usize).map(|start| (start, CHUNK));
        for (start, length) in [(0, 1)].into_iter().chain(later) {
            moments.push(self.chunk(params, &input.narrow(2, start, length), &mut history));
            history.end_chunk();
        }
        self.last.forward(params, &Tensor::cat(&moments, 2), &mut history)
    }

    /// The class measures a tile in patches, and asks in pixels whether there are several.
    fn tiles(&self, tile: Tile) -> Tiles {
        let longest_whole = tile.side / self.sizes.patch;
        Tiles { longest_whole, ..Tiles::of_pixels(tile, self.sizes.space()) }
    }
}
