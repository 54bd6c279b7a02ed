//! AutoencoderKLWan: a causal autoencoder of videos, computed chunk by chunk, as Wan 2.1 and 2.2
//! and, under another name, Qwen-Image have it.
//!
//! The encoder reads one frame, then four at a time; the decoder one frame of latents at a time.
//! Each convolution keeps the frames that it needs of the chunks before.

mod blocks;
mod decoder;
mod encoder;
mod settings;
mod shortcut;

use tch::Tensor;

pub(super) use self::decoder::Decoder;
pub(super) use self::encoder::Encoder;
pub use self::settings::Wan;
pub(super) use self::settings::{DEVIATIONS, MEANS};
use self::shortcut::{Averaged, Repeated};
use super::picture::listed;
use super::{Design, Estimate, Factors, MOST_LEVELS, Network, Scaling, Tile};
use crate::error::Result;
use crate::nn::convolution::{blocks_to_channels, channels_to_blocks};
use crate::ops::FeatureOrder;

/// Frames that the encoder reads at once after the first one.
const CHUNK: i64 = 4;
/// Tiles of the classes.
pub(super) const TILE: Tile = Tile { side: 256, stride: 192 };

/// Sizes of one network.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    /// Channels of patches of pixels.
    pub pixels: i64,
    /// Side of a patch.
    pub patch: i64,
    /// Channels at full size.
    pub base: i64,
    /// Channels at each size as multiples of those at full size, the largest size first.
    pub multiples: Vec<i64>,
    /// Residual blocks at each size.
    pub blocks: i64,
    /// True where a halving of the sides halves the frames, too.
    pub halves_time: Vec<bool>,
    /// True if each size has a shortcut of its own.
    pub is_residual: bool,
    pub latents: i64,
}

impl Sizes {
    /// Channels at each size, the largest size first.
    fn widths(&self) -> Vec<i64> {
        self.multiples.iter().map(|multiple| self.base * multiple).collect()
    }

    /// Patches along the side of a latent.
    fn space(&self) -> i64 {
        1 << self.halves_time.len()
    }

    /// Colours of a pixel.
    fn colours(&self) -> i64 {
        self.pixels / (self.patch * self.patch)
    }

    /// Pixels and frames for a model's latents.
    pub fn factors(&self) -> Factors {
        Factors {
            colours: self.colours(),
            channels: self.latents,
            space: self.space() * self.patch,
            time: Some(CHUNK),
        }
    }

    /// # Errors
    /// A text that begins with the name of a field.
    pub fn check(&self) -> Result<(), String> {
        let (levels, halvings) = (self.multiples.len(), self.halves_time.len());
        if levels == 0 || levels > MOST_LEVELS {
            return Err(format!("dim_mult has {}, not 1 to {MOST_LEVELS}", listed(levels)));
        }
        if halvings + 1 != levels {
            return Err(format!(
                "temperal_downsample has {}, dim_mult {levels}; it must have one less",
                listed(halvings)
            ));
        }
        if self.halves_time.iter().filter(|halves| **halves).count() != 2 {
            return Err(format!(
                "temperal_downsample must be true twice, since videos are read in chunks of {CHUNK} \
                 frames"
            ));
        }
        if self.is_residual { self.check_shortcuts() } else { Ok(()) }
    }

    /// Checks that the shortcuts of an encoder and a decoder of these sizes fit their channels.
    fn check_shortcuts(&self) -> Result<(), String> {
        let widths = self.widths();
        for (level, outputs) in widths.iter().enumerate() {
            let inputs = if level == 0 { self.base } else { widths[level - 1] };
            Averaged::check(inputs, *outputs, self.block(level))?;
        }
        for level in 1..widths.len() {
            let inputs = widths[(level + 1).min(widths.len() - 1)];
            Repeated::check(inputs, widths[level], self.block(level - 1))?;
        }
        Ok(())
    }

    /// Frames, rows and columns that become one behind the level of this index.
    fn block(&self, level: usize) -> [i64; 3] {
        match self.halves_time.get(level) {
            Some(true) => [2, 2, 2],
            Some(false) => [1, 2, 2],
            None => [1, 1, 1],
        }
    }
}

/// Makes channels of the pixels within patches of this side.
///
/// # Shapes
/// `pixels`: `[B, C, F, H, W]`. Returns `[B, C · side², F, H/side, W/side]`, channels in the order
/// colour, column, row.
fn patches_of(pixels: &Tensor, side: i64) -> Tensor {
    if side == 1 {
        return pixels.shallow_clone();
    }
    let turned = pixels.transpose(3, 4);
    blocks_to_channels(&turned, [1, side, side], FeatureOrder::ChannelFirst).transpose(3, 4)
}

/// Undoes [`patches_of`].
fn pixels_of(patches: &Tensor, side: i64) -> Tensor {
    if side == 1 {
        return patches.shallow_clone();
    }
    let turned = patches.transpose(3, 4);
    channels_to_blocks(&turned, [1, side, side], FeatureOrder::ChannelFirst).transpose(3, 4)
}

/// # Errors
/// A text that begins with the name of a field, if the lists have another length than `channels`.
pub(super) fn check_statistics(channels: i64, lists: [&[f64]; 2]) -> Result<(), String> {
    for (name, list) in ["latents_mean", "latents_std"].into_iter().zip(lists) {
        if list.len() as i64 != channels {
            return Err(format!("{name} has {}, z_dim is {channels}", listed(list.len())));
        }
    }
    Ok(())
}

/// The scaling by means and standard deviations.
pub(super) fn scaling(means: &[f64], deviations: &[f64]) -> Scaling {
    let factors: Vec<f64> = deviations.iter().map(|deviation| 1.0 / deviation).collect();
    Scaling::new(means, &factors)
}

impl Wan {
    fn sizes(&self) -> Sizes {
        Sizes {
            pixels: self.in_channels,
            patch: self.patch_size.unwrap_or(1),
            base: self.base_dim,
            multiples: self.dim_mult.clone(),
            blocks: self.num_res_blocks,
            halves_time: self.temperal_downsample.clone(),
            is_residual: self.is_residual,
            latents: self.z_dim,
        }
    }

    fn decoder_sizes(&self) -> Sizes {
        Sizes {
            pixels: self.out_channels,
            base: self.decoder_base_dim.unwrap_or(self.base_dim),
            blocks: self.num_res_blocks + 1,
            ..self.sizes()
        }
    }

    fn check_patches(&self) -> Result<(), String> {
        let places = self.patch_size.unwrap_or(1).pow(2);
        let channels = [("in_channels", self.in_channels), ("out_channels", self.out_channels)];
        match channels.into_iter().find(|(_, channels)| channels % places != 0) {
            Some((name, channels)) => {
                Err(format!("{name} is {channels}, no multiple of the {places} places of a patch"))
            }
            None => Ok(()),
        }
    }

    fn check_factors(&self) -> Result<(), String> {
        let Factors { space, time, .. } = self.factors();
        let told = [
            ("scale_factor_spatial", self.scale_factor_spatial, space),
            ("scale_factor_temporal", self.scale_factor_temporal, time.unwrap_or(1)),
        ];
        match told.into_iter().find(|(_, told, real)| told != real) {
            Some((name, told, real)) => {
                Err(format!("{name} is {told}, the other settings make it {real}"))
            }
            None => Ok(()),
        }
    }
}

/// # Errors
/// A text, if attention is asked for where no published autoencoder has it.
pub(super) fn check_attention(scales: &[f64]) -> Result<(), String> {
    if scales.is_empty() {
        return Ok(());
    }
    Err("attn_scales must be empty: attention is supported in the middle alone".into())
}

impl Design for Wan {
    fn idle_fields(&self) -> &'static [&'static str] {
        &["clip_output", "dropout"]
    }

    fn check(&self) -> Result<(), String> {
        check_attention(&self.attn_scales)?;
        check_statistics(self.z_dim, [&self.latents_mean, &self.latents_std])?;
        self.check_patches()?;
        self.sizes().check()?;
        self.decoder_sizes().check()?;
        self.check_factors()
    }

    fn encoder(&self) -> Box<dyn Network> {
        Box::new(Encoder::new(&self.sizes()))
    }

    fn decoder(&self) -> Box<dyn Network> {
        Box::new(Decoder::new(&self.decoder_sizes()))
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
        Estimate::Mean
    }
}
