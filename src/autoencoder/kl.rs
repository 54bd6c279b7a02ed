//! AutoencoderKL: that of Stable Diffusion's architecture, as FLUX.1 has it.

use tch::Tensor;

use super::picture::{Activation, Decoder, DownBlock, Encoder, Levels, UpBlock};
use super::{Design, Estimate, Factors, MOST_BLOCKS, Network, Scaling, Tile};
use crate::error::Result;
use crate::settings::{above, settings};

settings! {
    /// The fields of an AutoencoderKL's `config.json`, with the class's defaults.
    pub struct Kl {
        /// Channels of pixels.
        pub in_channels: i64 = 3, in 1..=1024;
        /// Channels of decoded pixels.
        pub out_channels: i64 = 3, in 1..=1024;
        /// The encoder's blocks.
        pub down_block_types: Vec<DownBlock> = vec![DownBlock::Residual];
        /// The decoder's blocks.
        pub up_block_types: Vec<UpBlock> = vec![UpBlock::Residual];
        /// Channels of each block of the encoder, from pixels to latents.
        pub block_out_channels: Vec<i64> = vec![64], in 1..=65_536;
        /// Residual blocks within a block of the encoder; the decoder has one more.
        pub layers_per_block: i64 = 1, in 1..=MOST_BLOCKS;
        /// The nonlinearity.
        pub act_fn: Activation = Activation::Silu;
        /// Channels of latents.
        pub latent_channels: i64 = 4, in 1..=65_536;
        /// Groups of channels that are normalized together.
        pub norm_num_groups: i64 = 32, in 1..=65_536;
        /// Side of a tile.
        pub sample_size: i64 = 32, in 1..=65_536;
        /// A model's latents are (z - shift_factor) * scaling_factor.
        pub scaling_factor: f64 = 0.18215, in above(0.0);
        /// Taken from latents before they are scaled.
        pub shift_factor: Option<f64> = None;
        /// True if moments pass a last convolution of side 1.
        pub use_quant_conv: bool = true;
        /// True if latents pass a first convolution of side 1.
        pub use_post_quant_conv: bool = true;
        /// True if the middle has attention.
        pub mid_block_add_attention: bool = true;
    }
}

impl Kl {
    fn levels(&self) -> Levels {
        Levels {
            pixels: self.in_channels,
            latents: self.latent_channels,
            widths: self.block_out_channels.clone(),
            blocks: self.layers_per_block,
            groups: self.norm_num_groups,
            has_attention: self.mid_block_add_attention,
            has_last: self.use_quant_conv,
        }
    }
}

impl Design for Kl {
    fn idle_fields(&self) -> &'static [&'static str] {
        &["force_upcast"]
    }

    fn check(&self) -> Result<(), String> {
        let (down, up) = (self.down_block_types.len(), self.up_block_types.len());
        self.levels().check("block_out_channels", [down, up])
    }

    fn encoder(&self) -> Box<dyn Network> {
        Box::new(Encoder::new(&self.levels()))
    }

    fn decoder(&self) -> Box<dyn Network> {
        Box::new(Decoder::new(&Levels {
            pixels: self.out_channels,
            blocks: self.layers_per_block + 1,
            has_last: self.use_post_quant_conv,
            ..self.levels()
        }))
    }

    fn scaling(&self, _: &dyn Fn(&str) -> Result<Tensor>) -> Result<Scaling> {
        Ok(Scaling::new(&[self.shift_factor.unwrap_or(0.0)], &[self.scaling_factor]))
    }

    fn factors(&self) -> Factors {
        Factors {
            colours: self.in_channels,
            channels: self.latent_channels,
            space: self.levels().space(),
            time: None,
        }
    }

    fn tile(&self) -> Tile {
        Tile::with_quarter(self.sample_size)
    }

    fn estimate(&self) -> Estimate {
        Estimate::Sample
    }
}
