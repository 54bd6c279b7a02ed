//! The networks of autoencoders of pictures: residual blocks at several sizes of the picture, with
//! attention over all places at the smallest one.

mod blocks;
mod decoder;
mod encoder;

pub(super) use decoder::Decoder;
pub(super) use encoder::Encoder;

use super::MOST_LEVELS;
use crate::settings::choice;

choice! {
    /// A block of the encoder; the class is built of others, too, which no published one has.
    pub enum DownBlock {
        /// Residual blocks, then half the sides.
        "DownEncoderBlock2D" => Residual,
    }
}

choice! {
    /// A block of the decoder.
    pub enum UpBlock {
        /// Residual blocks, then twice the sides.
        "UpDecoderBlock2D" => Residual,
    }
}

choice! {
    /// The nonlinearity of the networks; its two names mean the same.
    pub enum Activation {
        /// x · sigmoid(x).
        "silu" => Silu,
        /// x · sigmoid(x).
        "swish" => Swish,
    }
}

/// Sizes of one network.
#[derive(Clone, Debug)]
pub(super) struct Levels {
    /// Channels of pixels, and of latents.
    pub pixels: i64,
    pub latents: i64,
    /// Channels at each size of the picture, the largest size first.
    pub widths: Vec<i64>,
    /// Residual blocks at each size.
    pub blocks: i64,
    /// Groups of channels that are normalized together.
    pub groups: i64,
    /// True if the middle has attention.
    pub has_attention: bool,
    /// True if there is a convolution of side 1 at the latents' end.
    pub has_last: bool,
}

impl Levels {
    /// Pixels along the side of a latent.
    pub fn space(&self) -> i64 {
        1 << (self.widths.len() - 1)
    }

    /// `field`: that of the widths. `counts`: numbers of the encoder's and the decoder's blocks.
    ///
    /// # Errors
    /// A text that begins with the name of a field.
    pub fn check(&self, field: &str, counts: [usize; 2]) -> Result<(), String> {
        let levels = self.widths.len();
        if levels == 0 || levels > MOST_LEVELS {
            return Err(format!("{field} has {}, not 1 to {MOST_LEVELS}", listed(levels)));
        }
        let mut types = ["down_block_types", "up_block_types"].into_iter().zip(counts);
        if let Some((name, count)) = types.find(|(_, count)| *count != levels) {
            return Err(format!("{name} has {}, {field} {levels}", listed(count)));
        }
        match self.widths.iter().find(|width| *width % self.groups != 0) {
            Some(width) => {
                Err(format!("{field}: {width} is no multiple of norm_num_groups, {}", self.groups))
            }
            None => Ok(()),
        }
    }
}

/// "1 entry", "4 entries".
pub(super) fn listed(count: usize) -> String {
    if count == 1 { "1 entry".into() } else { format!("{count} entries") }
}
