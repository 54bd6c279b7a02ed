//! From prompts and pixels to the tensors that a family trains on, and from latents back to pixels,
//! as the family's published pipeline does it.
//!
//! [`Pipeline::open`] reads the headers of a pipeline's folder; each of its networks is loaded when
//! it is first needed, and [`Pipeline::unload`] frees them. Pixels are `[B, 3, H, W]` or `[B, 3, F,
//! H, W]` from -1 to 1. Conditions are those of one sample, without a batch axis, under the keys of
//! batches.
//!
//! A family is a file here and a line of [`Family`].
//!
//! | file | holds |
//! |---|---|
//! | here | the families, and the interface of each |
//! | `pipeline.rs` | a pipeline with the networks that are loaded |
//! | `folder.rs` | the parts of a pipeline's folder |
//! | `latents.rs`, `texts.rs` | what several families have: an autoencoder, a tokenizer with its encoder |
//! | `flux.rs`, `flux2.rs`, … | a family's way |
//! | `dit.rs` | the demo's own encoding, which needs no folder |

mod dit;
mod flux;
mod flux2;
mod folder;
mod hunyuan_video15;
mod latents;
mod pipeline;
mod qwen_image;
mod texts;
mod wan;

use std::collections::BTreeMap;
use std::fmt;

use tch::{Device, Kind, Tensor};

use crate::autoencoder::Factors;
use crate::data::DataType;
use crate::data::group::Layout;
use crate::error::Result;
use crate::registry::registry;
use crate::rng::Stream;
pub use folder::Folder;
pub use pipeline::Pipeline;

registry! {
    /// A model family, by its table of the configuration.
    #[derive(PartialOrd, Ord)]
    pub enum Family: Facts by word {
        /// FLUX.1.
        "flux" => Flux = flux::FACTS,
        /// FLUX.2.
        "flux2" => Flux2 = flux2::FACTS,
        /// Qwen-Image.
        "qwen_image" => QwenImage = qwen_image::FACTS,
        /// Wan.
        "wan" => Wan = wan::FACTS,
        /// HunyuanVideo 1.5.
        "hunyuan_video15" => HunyuanVideo15 = hunyuan_video15::FACTS,
        /// The demo's own small transformer.
        "dit" => Dit = dit::FACTS,
    }
}

/// Facts of a family, and the way to its encoding.
#[derive(Debug)]
pub struct Facts {
    pub data_type: DataType,
    /// Folders that a pipeline of the family has; none if the family needs no pipeline.
    pub parts: &'static [&'static str],
    open: fn(&Folder) -> Result<Box<dyn Encoding>>,
}

/// Conditions of one sample by the keys of batches, on the CPU.
pub type Conditions = BTreeMap<String, Tensor>;

/// The interface of a family: what is known from the headers of its pipeline, and its networks.
/// `kind` is the one in which a network computes; conditions have it, too.
pub trait Encoding: fmt::Debug + Send {
    fn factors(&self) -> Factors;

    /// Kinds and shapes of what a prompt becomes, known from its tokens alone.
    fn prompt_layout(&self, prompt: &str, kind: Kind) -> Layout;

    /// Kinds and shapes of the conditions that pixels become, beside latents.
    fn pixel_layout(&self, kind: Kind) -> Layout {
        let _ = kind;
        Layout::new()
    }

    /// # Errors
    /// Errors of loading, as all three.
    fn to_conditions(&self, device: Device, kind: Kind) -> Result<Box<dyn ToConditions>>;

    fn to_latents(&self, device: Device, kind: Kind) -> Result<Box<dyn ToLatents>>;

    fn to_pixels(&self, device: Device, kind: Kind) -> Result<Box<dyn ToPixels>>;
}

/// Encodes prompts.
pub trait ToConditions: Send {
    /// Returns conditions of the kinds and shapes of [`Encoding::prompt_layout`], one for each prompt.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if tokenizer and encoder do not fit each other.
    fn conditions(&self, prompts: &[&str]) -> Result<Vec<Conditions>>;
}

/// Encodes pixels.
pub trait ToLatents: Send {
    /// Returns the latents of a model, f32; `stream`: the draws of those that are drawn.
    fn latents(&self, pixels: &Tensor, stream: &Stream) -> Tensor;

    /// Returns conditions of the kinds and shapes of [`Encoding::pixel_layout`], one map for each row.
    fn conditions(&self, pixels: &Tensor) -> Vec<Conditions> {
        (0..pixels.size()[0]).map(|_| Conditions::new()).collect()
    }
}

/// Decodes latents.
pub trait ToPixels: Send {
    /// Returns pixels from the latents of a model, of any floating kind; they may go beyond -1 and 1.
    fn pixels(&self, latents: &Tensor) -> Tensor;
}
