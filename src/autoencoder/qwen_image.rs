//! AutoencoderKLQwenImage: Wan 2.1's networks under Qwen-Image's name.

use tch::Tensor;

use super::wan::{
    DEVIATIONS, Decoder, Encoder, MEANS, Sizes, TILE, check_attention, check_statistics, scaling,
};
use super::{Design, Estimate, Factors, MOST_BLOCKS, Network, Scaling, Tile};
use crate::error::Result;
use crate::settings::{above, settings};

settings! {
    /// The fields of an AutoencoderKLQwenImage's `config.json`, with the class's defaults.
    pub struct QwenImage {
        /// Channels at full size.
        pub base_dim: i64 = 96, in 1..=16_384;
        /// Channels of latents.
        pub z_dim: i64 = 16, in 1..=16_384;
        /// Channels at each size, as multiples of those at full size.
        pub dim_mult: Vec<i64> = vec![1, 2, 4, 4], in 1..=1024;
        /// Residual blocks at each size of the encoder; the decoder has one more.
        pub num_res_blocks: i64 = 2, in 1..=MOST_BLOCKS;
        /// Sizes with attention; none is supported, except for the middle's.
        pub attn_scales: Vec<f64> = Vec::new();
        /// For each halving of the sides, true if it halves the frames, too.
        pub temperal_downsample: Vec<bool> = vec![false, true, true];
        /// Channels of pixels.
        pub input_channels: i64 = 3, in 1..=1024;
        /// Mean of each channel of the latents.
        pub latents_mean: Vec<f64> = MEANS.to_vec();
        /// Standard deviation of each channel of the latents.
        pub latents_std: Vec<f64> = DEVIATIONS.to_vec(), in above(0.0);
    }
}

impl QwenImage {
    fn sizes(&self) -> Sizes {
        Sizes {
            pixels: self.input_channels,
            patch: 1,
            base: self.base_dim,
            multiples: self.dim_mult.clone(),
            blocks: self.num_res_blocks,
            halves_time: self.temperal_downsample.clone(),
            is_residual: false,
            latents: self.z_dim,
        }
    }
}

impl Design for QwenImage {
    fn idle_fields(&self) -> &'static [&'static str] {
        &["dropout"]
    }

    fn check(&self) -> Result<(), String> {
        check_attention(&self.attn_scales)?;
        check_statistics(self.z_dim, [&self.latents_mean, &self.latents_std])?;
        self.sizes().check()
    }

    fn encoder(&self) -> Box<dyn Network> {
        Box::new(Encoder::new(&self.sizes()))
    }

    fn decoder(&self) -> Box<dyn Network> {
        let sizes = self.sizes();
        Box::new(Decoder::new(&Sizes { blocks: sizes.blocks + 1, ..sizes }))
    }

    fn scaling(&self, _: &dyn Fn(&str) -> Result<Tensor>) -> Result<Scaling> {
        Ok(scaling(&self.latents_mean, &self.latents_std))
    }

    fn factors(&self) -> Factors {
        self.sizes().factors()
    }

    fn tile(&self) -> Tile {
        TILE
    }

    fn estimate(&self) -> Estimate {
        Estimate::Sample
    }
}
