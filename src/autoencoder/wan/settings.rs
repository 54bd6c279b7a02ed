//! The fields of an AutoencoderKLWan's `config.json`, with the class's defaults.

use crate::autoencoder::MOST_BLOCKS;
use crate::settings::{above, settings};

/// Means and deviations of the latents of Wan 2.1 and Qwen-Image, a channel each.
pub const MEANS: [f64; 16] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517,
    -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
];
pub const DEVIATIONS: [f64; 16] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
    1.6382, 1.1253, 2.8251, 1.9160,
];

settings! {
    /// The fields of an AutoencoderKLWan's `config.json`.
    pub struct Wan {
        /// Channels of the encoder at full size.
        pub base_dim: i64 = 96, in 1..=16_384;
        /// The same of the decoder; unset: base_dim.
        pub decoder_base_dim: Option<i64> = None, in 1..=16_384;
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
        /// Mean of each channel of the latents.
        pub latents_mean: Vec<f64> = MEANS.to_vec();
        /// Standard deviation of each channel of the latents.
        pub latents_std: Vec<f64> = DEVIATIONS.to_vec(), in above(0.0);
        /// True if each size has a shortcut of its own (Wan 2.2 TI2V-5B).
        pub is_residual: bool = false;
        /// Channels of pixels, or of patches of them.
        pub in_channels: i64 = 3, in 1..=4096;
        /// Channels of decoded pixels, or of patches of them.
        pub out_channels: i64 = 3, in 1..=4096;
        /// Side of the patches whose pixels are channels; unset: 1.
        pub patch_size: Option<i64> = None, in 1..=16;
        /// Frames of pixels for each frame of latents after the first.
        pub scale_factor_temporal: i64 = 4, in 1..=64;
        /// Pixels along the side of a latent.
        pub scale_factor_spatial: i64 = 8, in 1..=4096;
    }
}
