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
//! | `dit.rs` | the demo's own encoding, which needs no folder |

mod dit;
mod folder;
mod pipeline;

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

    /// # Errors
    /// Errors of loading, as all three.
    fn to_conditions(&self, device: Device, kind: Kind) -> Result<Box<dyn ToConditions>>;

    fn to_latents(&self, device: Device, kind: Kind) -> Result<Box<dyn ToLatents>>;

    fn to_pixels(&self, device: Device, kind: Kind) -> Result<Box<dyn ToPixels>>;
}

/// Encodes prompts.
pub trait ToConditions: Send {
    /// Each with the kinds and shapes of [`Encoding::prompt_layout`].
    fn conditions(&self, prompts: &[&str]) -> Vec<Conditions>;
}

/// Encodes pixels.
pub trait ToLatents: Send {
    /// The latents of a model, f32; `stream`: the draws of those that are drawn.
    fn latents(&self, pixels: &Tensor, stream: &Stream) -> Tensor;
}

/// Decodes latents.
pub trait ToPixels: Send {
    /// Pixels from the latents of a model, of any floating kind; they may go beyond -1 and 1.
    fn pixels(&self, latents: &Tensor) -> Tensor;
}
