//! Autoencoders: pictures and videos to the latents of models and back, by the published weights of
//! diffusers' classes. Nothing is trained here: every pass runs forward and without a graph.
//!
//! [`Autoencoder::open`] reads a folder as published: `config.json`, and the names and shapes of
//! its weights. Each of its two networks is loaded by itself, as [`Encoder`] or [`Decoder`].
//! Pixels are `[B, 3, H, W]` or, for classes that take videos, `[B, 3, F, H, W]`, from -1 to 1.
//!
//! | module | holds |
//! |---|---|
//! | here | the classes, and what each of them states |
//! | `folder` | `config.json` and the weights of a folder |
//! | `halves` | the two networks with their weights, whole or in tiles |
//! | `posterior`, `scaling` | from an encoder's outputs to latents, from those to a model's |
//! | `tiles` | overlapping tiles and how they are blended |
//! | `factors` | latents by the sizes of pixels |
//! | `picture` | the networks of [`Kl`] and [`Flux2`] |
//! | `wan` | the networks of [`Wan`] and [`QwenImage`] |
//! | `hunyuan_video15` | the networks of [`HunyuanVideo15`] |
//!
//! Source: diffusers 0.42.1, `models/autoencoders`, whose names of classes, fields and parameters
//! these are.

mod factors;
mod flux2;
mod folder;
mod halves;
mod hunyuan_video15;
mod kl;
mod picture;
mod posterior;
mod qwen_image;
mod scaling;
mod tiles;
mod wan;

use tch::Tensor;

pub use factors::Factors;
pub use flux2::Flux2;
pub use folder::Autoencoder;
pub use halves::{Decoder, Encoder};
pub use hunyuan_video15::HunyuanVideo15;
pub use kl::Kl;
pub use picture::{Activation, DownBlock, UpBlock};
pub use posterior::{Estimate, Posterior};
pub use qwen_image::QwenImage;
pub use scaling::Scaling;
pub use tiles::{Tile, Tiles};
pub use wan::Wan;

use crate::error::Result;
use crate::nn::{ParamSet, Views};
use crate::registry::registry;

/// Most sizes of a picture within a network, and most residual blocks at each of them.
const MOST_LEVELS: usize = 8;
const MOST_BLOCKS: i64 = 16;

/// The interface of a class: settings that build two networks.
pub trait Design {
    /// Fields that `config.json` may have and that change no number here.
    fn idle_fields(&self) -> &'static [&'static str];

    /// Checks what a range of one field cannot.
    ///
    /// # Errors
    /// A text that begins with the name of a field.
    fn check(&self) -> Result<(), String>;

    fn encoder(&self) -> Box<dyn Network>;

    fn decoder(&self) -> Box<dyn Network>;

    /// Names and shapes of tensors that belong to neither network.
    fn statistics(&self) -> Vec<(&'static str, Vec<i64>)> {
        Vec::new()
    }

    /// The scaling between the latents and a model's; `read` reads one of the statistics.
    ///
    /// # Errors
    /// Errors of `read`.
    fn scaling(&self, read: &dyn Fn(&str) -> Result<Tensor>) -> Result<Scaling>;

    fn factors(&self) -> Factors;

    /// The tile that the class has by default.
    fn tile(&self) -> Tile;

    /// The estimate of the latents that the reference's datasets hold.
    fn estimate(&self) -> Estimate;
}

/// One network of an autoencoder: a pure function from its parameters and its input, pixels or
/// latents, to its output.
pub trait Network: Send {
    fn params(&self) -> &ParamSet;

    /// The input in the form of which tiles are cut.
    fn prepare(&self, input: &Tensor) -> Tensor {
        input.shallow_clone()
    }

    /// The output for a whole input or one tile of it.
    fn forward(&self, params: &Views, input: &Tensor) -> Tensor;

    /// The network's output from that of [`forward`](Self::forward), its tiles joined.
    fn finish(&self, output: Tensor) -> Tensor {
        output
    }

    /// Tiles of the prepared input for a tile in pixels.
    fn tiles(&self, tile: Tile) -> Tiles;
}

registry! {
    /// The classes by the name that `config.json` gives them: one line a class.
    pub enum AutoencoderClass: Design {
        "AutoencoderKL" => Kl(Kl),
        "AutoencoderKLFlux2" => Flux2(Flux2),
        "AutoencoderKLWan" => Wan(Wan),
        "AutoencoderKLQwenImage" => QwenImage(QwenImage),
        "AutoencoderKLHunyuanVideo15" => HunyuanVideo15(HunyuanVideo15),
    }
}
