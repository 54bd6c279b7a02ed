//! AutoencoderKLHunyuanVideo15: a causal autoencoder of videos, computed at once over all frames.
//!
//! Sides and frames change by blocks of places that become channels and back, beside a shortcut of
//! averaged or repeated channels. A video's first frame has blocks of its own, of one frame.

mod blocks;
mod decoder;
mod encoder;
mod resampling;

use tch::Tensor;

use self::decoder::Decoder;
use self::encoder::Encoder;
use super::picture::listed;
use super::{Design, Estimate, Factors, MOST_BLOCKS, MOST_LEVELS, Network, Scaling, Tile};
use crate::error::Result;
use crate::settings::{above, settings};

settings! {
    /// The fields of an AutoencoderKLHunyuanVideo15's `config.json`, with the class's defaults.
    pub struct HunyuanVideo15 {
        /// Channels of pixels.
        pub in_channels: i64 = 3, in 1..=1024;
        /// Channels of decoded pixels.
        pub out_channels: i64 = 3, in 1..=1024;
        /// Channels of latents.
        pub latent_channels: i64 = 32, in 1..=16_384;
        /// Channels at each size, from pixels to latents.
        pub block_out_channels: Vec<i64> = vec![128, 256, 512, 1024, 1024], in 1..=65_536;
        /// Residual blocks at each size of the encoder; the decoder has one more.
        pub layers_per_block: i64 = 2, in 1..=MOST_BLOCKS;
        /// Pixels along the side of a latent.
        pub spatial_compression_ratio: i64 = 16, in 1..=4096;
        /// Frames of pixels for each frame of latents after the first.
        pub temporal_compression_ratio: i64 = 4, in 1..=64;
        /// True if halving the sides changes the channels to those of the next size.
        pub downsample_match_channel: bool = true;
        /// True if doubling the sides does.
        pub upsample_match_channel: bool = true;
        /// A model's latents are the autoencoder's times this.
        pub scaling_factor: f64 = 1.03682, in above(0.0);
    }
}

/// Sizes of one network, from its input to its output.
#[derive(Clone, Debug)]
struct Sizes {
    inputs: i64,
    outputs: i64,
    /// Residual blocks at each size.
    blocks: i64,
    levels: Vec<LevelSizes>,
}

/// Sizes of the part of a network at one size of the picture.
#[derive(Clone, Copy, Debug)]
struct LevelSizes {
    inputs: i64,
    width: i64,
    /// The change of size behind it, if there is one.
    change: Option<Change>,
}

/// A change of the size of a picture.
#[derive(Clone, Copy, Debug)]
struct Change {
    outputs: i64,
    /// True if the number of frames changes, too.
    of_time: bool,
}

impl HunyuanVideo15 {
    /// Halvings of the sides, and of the frames.
    fn halvings(&self) -> [usize; 2] {
        [self.spatial_compression_ratio, self.temporal_compression_ratio]
            .map(|ratio| ratio.ilog2() as usize)
    }

    fn encoder_sizes(&self) -> Sizes {
        let [of_space, of_time] = self.halvings();
        let begins_time = of_space - of_time;
        Sizes {
            inputs: self.in_channels,
            outputs: 2 * self.latent_channels,
            blocks: self.layers_per_block,
            levels: levels(&self.block_out_channels, self.downsample_match_channel, |index| {
                (index < of_space).then_some(index >= begins_time)
            }),
        }
    }

    fn decoder_sizes(&self) -> Sizes {
        let [of_space, of_time] = self.halvings();
        let widths: Vec<i64> = self.block_out_channels.iter().rev().copied().collect();
        Sizes {
            inputs: self.latent_channels,
            outputs: self.out_channels,
            blocks: self.layers_per_block + 1,
            levels: levels(&widths, self.upsample_match_channel, |index| {
                (index < of_space).then_some(index < of_time)
            }),
        }
    }

    fn check_ratios(&self) -> Result<(), String> {
        let (space, time) = (self.spatial_compression_ratio, self.temporal_compression_ratio);
        let ratios = [("spatial_compression_ratio", space), ("temporal_compression_ratio", time)];
        for (name, ratio) in ratios {
            if ratio.count_ones() != 1 {
                return Err(format!("{name} is {ratio}, no power of 2"));
            }
        }
        if time > space {
            return Err(format!(
                "temporal_compression_ratio is {time}, more than spatial_compression_ratio, {space}"
            ));
        }
        let (levels, [halvings, _]) = (self.block_out_channels.len(), self.halvings());
        if levels > MOST_LEVELS || levels <= halvings {
            return Err(format!(
                "block_out_channels has {}, not {} to {MOST_LEVELS}, for a \
                 spatial_compression_ratio of {space}",
                listed(levels),
                halvings + 1
            ));
        }
        Ok(())
    }

    /// Checks that channels can be averaged and repeated from size to size.
    fn check_channels(&self) -> Result<(), String> {
        let (encoder, decoder) = (self.encoder_sizes(), self.decoder_sizes());
        let misfit = |width: i64, outputs: i64, places: i64| {
            let what = "channels cannot become";
            Err(format!("block_out_channels: {width} {what} {outputs} by blocks of {places}"))
        };
        for (width, outputs, places) in encoder.changes() {
            if 4 * width % outputs != 0 || outputs % places != 0 {
                return misfit(width, outputs, places);
            }
        }
        for (width, outputs, places) in decoder.changes() {
            let is_whole = places == 4 || width % places == 0;
            if 4 * outputs % width != 0 || !is_whole {
                return misfit(width, outputs, places);
            }
        }
        let (wide, moments, latents) = (encoder.last_width(), encoder.outputs, decoder.inputs);
        if wide % moments != 0 || wide % latents != 0 {
            let what = "channels cannot be averaged to";
            return Err(format!("latent_channels: {wide} {what} {moments}"));
        }
        Ok(())
    }
}

impl Sizes {
    /// Inputs, outputs and places of a block for each change of size.
    fn changes(&self) -> impl Iterator<Item = (i64, i64, i64)> {
        let changes = self.levels.iter().filter_map(|level| Some((level.width, level.change?)));
        changes.map(|(width, change)| (width, change.outputs, if change.of_time { 8 } else { 4 }))
    }

    fn last_width(&self) -> i64 {
        self.levels[self.levels.len() - 1].width
    }
}

/// `change`: for the index of a level, `None` if the size stays, else whether the frames change,
/// too. `matches`: true if a change of size gives the channels of the next level.
fn levels(
    widths: &[i64],
    matches: bool,
    change: impl Fn(usize) -> Option<bool>,
) -> Vec<LevelSizes> {
    let mut inputs = widths[0];
    let mut levels = Vec::new();
    for (index, width) in widths.iter().copied().enumerate() {
        let outputs = if matches { widths[(index + 1).min(widths.len() - 1)] } else { width };
        let change = change(index).map(|of_time| Change { outputs, of_time });
        levels.push(LevelSizes { inputs, width, change });
        inputs = if change.is_some() { outputs } else { width };
    }
    levels
}

impl Design for HunyuanVideo15 {
    fn idle_fields(&self) -> &'static [&'static str] {
        &[]
    }

    fn check(&self) -> Result<(), String> {
        self.check_ratios()?;
        self.check_channels()
    }

    fn encoder(&self) -> Box<dyn Network> {
        Box::new(Encoder::new(&self.encoder_sizes(), self.spatial_compression_ratio))
    }

    fn decoder(&self) -> Box<dyn Network> {
        Box::new(Decoder::new(&self.decoder_sizes(), self.spatial_compression_ratio))
    }

    fn scaling(&self, _: &dyn Fn(&str) -> Result<Tensor>) -> Result<Scaling> {
        Ok(Scaling::new(&[0.0], &[self.scaling_factor]))
    }

    fn factors(&self) -> Factors {
        Factors {
            colours: self.in_channels,
            channels: self.latent_channels,
            space: self.spatial_compression_ratio,
            time: Some(self.temporal_compression_ratio),
        }
    }

    fn tile(&self) -> Tile {
        Tile::with_quarter(256)
    }

    fn estimate(&self) -> Estimate {
        Estimate::Mean
    }
}
