//! Encoders of texts and pictures: the conditions of models, by the published weights of
//! transformers' classes. Nothing is trained here: every pass runs forward and without a graph.
//!
//! [`TextEncoder::open`] reads a folder as published: `config.json`, and the names and shapes of
//! its weights. [`TextEncoder::load`] brings what one [`Output`] needs to a device: the layers
//! below the last state that is asked for, and neither a vision tower nor a head.
//! [`ImageEncoder`] does the same for pictures.
//!
//! | module | holds |
//! |---|---|
//! | here | the classes, and what each of them states |
//! | `text`, `image` | an encoder's folder, and the encoder with its weights |
//! | `class` | the class that a `config.json` describes |
//! | `t5` | the networks of [`T5`], ByT5 among them, and of [`Umt5`] |
//! | `clip`, `siglip` | the networks of [`Clip`] and [`Siglip`] |
//! | `causal` | the network of the decoders |
//! | `qwen`, `mistral` | the decoders' classes: [`Qwen25Vl`], [`Qwen3`] and [`Mistral`] |
//! | `layers` | parts that several networks have |
//! | `sight` | the keys that each query sees |
//!
//! Source: transformers 5.24.0, whose names of classes, fields and parameters these are. Masked
//! rows are those of its attention by `sdpa`, its default.

mod causal;
mod class;
mod clip;
mod image;
mod layers;
mod mistral;
mod qwen;
mod sight;
mod siglip;
mod t5;
mod text;

use tch::Tensor;

pub use causal::{Activation, Rope};
pub use clip::Clip;
pub use image::{ImageEncoder, LoadedImageEncoder, pixels_of};
pub use layers::MlpActivation;
pub use mistral::{Mistral, TextModel};
pub use qwen::{Qwen3, Qwen25Vl};
pub use siglip::Siglip;
pub use t5::{FeedForward, T5, Umt5};
pub use text::{LoadedTextEncoder, TextEncoder};

use crate::nn::{ParamSet, Views};
use crate::published::Names;
use crate::registry::registry;

/// Most layers of a network.
const MOST_LAYERS: i64 = 256;
/// Greatest width of anything in a network.
const MOST_WIDTH: i64 = 1 << 18;
/// Most tokens of a vocabulary.
const MOST_TOKENS: i64 = 1 << 22;

/// The part of a text encoder's states that a model takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The last states, after the final normalization.
    Last,
    /// One vector a text, for classes that have one: the last state at the first end token.
    Pooled,
    /// The states after so many layers, side by side on the last axis; 0 are the embeddings.
    /// As transformers' `hidden_states`: those after all layers are normalized, except for CLIP's.
    Hidden(Vec<usize>),
}

/// Sizes of a text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub layers: usize,
    /// Features of a token's state.
    pub width: i64,
    /// Number of different tokens.
    pub vocabulary: i64,
    /// Most tokens of a text, where places have learned embeddings.
    pub longest: Option<i64>,
}

/// The part of a network that is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Layers from the first on.
    pub layers: usize,
    /// True with the final normalization.
    pub is_normed: bool,
}

/// The token that ends a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndToken {
    Id(i64),
    /// The greatest id that a text has.
    Greatest,
}

/// The interface of a class: settings that build a network.
pub trait Design {
    /// Checks what a range of one field cannot.
    ///
    /// # Errors
    /// A text that begins with the name of a field.
    fn check(&self) -> Result<(), String>;

    fn sizes(&self) -> Sizes;

    /// Names of the tensors in files.
    fn names(&self) -> Names;

    /// The network down to a depth. A network of all layers has every parameter of the class.
    fn network(&self, depth: Depth) -> Box<dyn Network>;

    /// True if the states after all layers are normalized in transformers' `hidden_states`.
    fn norms_last(&self) -> bool {
        true
    }

    /// The token at whose first place a text's pooled vector stands; `None` if the class has no
    /// pooled vectors.
    fn end_token(&self) -> Option<EndToken> {
        None
    }
}

/// A text encoder's network: a pure function from its parameters and tokens to states.
pub trait Network: Send {
    fn params(&self) -> &ParamSet;

    /// Returns the last states, normalized if the network's depth says so. `each` gets the states
    /// after 0, 1, … layers before.
    ///
    /// # Shapes
    /// `ids`: `[B, L]` of whole numbers; `mask`: boolean `[B, L]`, false where a token is padding.
    /// States are `[B, L, D]`.
    fn forward(
        &self,
        params: &Views,
        ids: &Tensor,
        mask: Option<&Tensor>,
        each: &mut dyn FnMut(usize, &Tensor),
    ) -> Tensor;
}

registry! {
    /// The classes of text encoders by the name that `config.json` gives them: one line a class.
    pub enum TextClass: Design {
        "T5EncoderModel" => T5(T5),
        "UMT5EncoderModel" => Umt5(Umt5),
        "CLIPTextModel" => Clip(Clip),
        "Qwen2_5_VLForConditionalGeneration" => Qwen25Vl(Qwen25Vl),
        "Qwen3ForCausalLM" => Qwen3(Qwen3),
        "Mistral3ForConditionalGeneration" => Mistral3(Mistral),
    }
}
