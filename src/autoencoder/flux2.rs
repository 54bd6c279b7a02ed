//! AutoencoderKLFlux2: FLUX.2's. Blocks of 2 x 2 latents are a model's channels, normalized by
//! statistics that stand beside the weights.

use tch::Tensor;

use super::picture::{Activation, Decoder, DownBlock, Encoder, Levels, UpBlock, listed};
use super::{Design, Estimate, Factors, MOST_BLOCKS, Network, Scaling, Tile};
use crate::error::Result;
use crate::settings::{above, settings};

/// Side of the blocks of latents.
const PATCH: i64 = 2;
/// Names of the statistics of a model's channels.
const MEAN: &str = "bn.running_mean";
const VARIANCE: &str = "bn.running_var";

settings! {
    /// The fields of an AutoencoderKLFlux2's `config.json`, with the class's defaults.
    pub struct Flux2 {
        /// Channels of pixels.
        pub in_channels: i64 = 3, in 1..=1024;
        /// Channels of decoded pixels.
        pub out_channels: i64 = 3, in 1..=1024;
        /// The encoder's blocks.
        pub down_block_types: Vec<DownBlock> = vec![DownBlock::Residual; 4];
        /// The decoder's blocks.
        pub up_block_types: Vec<UpBlock> = vec![UpBlock::Residual; 4];
        /// Channels of each block of the encoder, from pixels to latents.
        pub block_out_channels: Vec<i64> = vec![128, 256, 512, 512], in 1..=65_536;
        /// The same of the decoder; empty: those of the encoder.
        pub decoder_block_out_channels: Vec<i64> = Vec::new(), in 1..=65_536;
        /// Residual blocks within a block of the encoder; the decoder has one more.
        pub layers_per_block: i64 = 2, in 1..=MOST_BLOCKS;
        /// The nonlinearity.
        pub act_fn: Activation = Activation::Silu;
        /// Channels of latents, before blocks of them are channels.
        pub latent_channels: i64 = 32, in 1..=65_536;
        /// Groups of channels that are normalized together.
        pub norm_num_groups: i64 = 32, in 1..=65_536;
        /// Side of a tile.
        pub sample_size: i64 = 1024, in 1..=65_536;
        /// True if moments pass a last convolution of side 1.
        pub use_quant_conv: bool = true;
        /// True if latents pass a first convolution of side 1.
        pub use_post_quant_conv: bool = true;
        /// True if the middle has attention.
        pub mid_block_add_attention: bool = true;
        /// Added to the variance of a model's channels.
        pub batch_norm_eps: f64 = 1e-4, in above(0.0);
        /// Rows and columns of the blocks of latents.
        pub patch_size: [i64; 2] = [PATCH, PATCH], in PATCH..=PATCH;
    }
}

impl Flux2 {
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

    fn decoder_levels(&self) -> Levels {
        let own = &self.decoder_block_out_channels;
        let widths = if own.is_empty() { &self.block_out_channels } else { own };
        Levels {
            pixels: self.out_channels,
            widths: widths.clone(),
            blocks: self.layers_per_block + 1,
            has_last: self.use_post_quant_conv,
            ..self.levels()
        }
    }

    /// Channels of a model's latents.
    fn channels(&self) -> i64 {
        self.latent_channels * PATCH * PATCH
    }
}

impl Design for Flux2 {
    fn idle_fields(&self) -> &'static [&'static str] {
        &["batch_norm_momentum", "force_upcast"]
    }

    fn check(&self) -> Result<(), String> {
        let (down, up) = (self.down_block_types.len(), self.up_block_types.len());
        self.levels().check("block_out_channels", [down, up])?;
        let decoder = self.decoder_levels();
        if decoder.widths.len() != down {
            return Err(format!(
                "decoder_block_out_channels has {}, block_out_channels {down}",
                listed(decoder.widths.len())
            ));
        }
        decoder.check("decoder_block_out_channels", [down, up])
    }

    fn encoder(&self) -> Box<dyn Network> {
        Box::new(Encoder::new(&self.levels()))
    }

    fn decoder(&self) -> Box<dyn Network> {
        Box::new(Decoder::new(&self.decoder_levels()))
    }

    fn statistics(&self) -> Vec<(&'static str, Vec<i64>)> {
        vec![(MEAN, vec![self.channels()]), (VARIANCE, vec![self.channels()])]
    }

    fn scaling(&self, read: &dyn Fn(&str) -> Result<Tensor>) -> Result<Scaling> {
        Ok(Scaling::of_blocks(PATCH, &read(MEAN)?, &read(VARIANCE)?, self.batch_norm_eps))
    }

    fn factors(&self) -> Factors {
        Factors {
            colours: self.in_channels,
            channels: self.channels(),
            space: self.levels().space() * PATCH,
            time: None,
        }
    }

    fn tile(&self) -> Tile {
        Tile::with_quarter(self.sample_size)
    }

    fn estimate(&self) -> Estimate {
        Estimate::Mean
    }
}
