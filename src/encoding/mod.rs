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
use crate::data::group::Layout;
use crate::data::{DataType, TEXTS};
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
    /// Folders that some pipelines of the family have, too.
    pub optional_parts: &'static [&'static str],
    pub buckets: UsualBuckets,
    /// Side of the squares of latents that the published models take as one token.
    pub patch: i64,
    open: fn(&Folder) -> Result<Box<dyn Encoding>>,
}

/// Sizes of pixels that a family's datasets usually have.
#[derive(Clone, Copy, Debug)]
pub struct UsualBuckets {
    /// Most pixels of a picture or a frame.
    pub pixels: u64,
    /// Multiple of the sides.
    pub multiple: u32,
}

/// Those of the reference for families of pictures and of videos.
const PICTURES: UsualBuckets = UsualBuckets { pixels: 1024 * 1024, multiple: 64 };
const VIDEOS: UsualBuckets = UsualBuckets { pixels: 832 * 480, multiple: 16 };

impl Facts {
    pub fn is_of_videos(&self) -> bool {
        self.data_type == DataType::Video
    }
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
    /// Returns conditions of the kinds and shapes of [`Encoding::prompt_layout`], one for each
    /// prompt.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if tokenizer and encoder do not fit each other.
    fn conditions(&self, prompts: &[&str]) -> Result<Vec<Conditions>>;
}

/// Encodes pixels.
pub trait ToLatents: Send {
    /// Returns the latents of a model, f32; `stream`: the draws of those that are drawn.
    fn latents(&self, pixels: &Tensor, stream: &Stream) -> Tensor;

    /// Returns conditions of the kinds and shapes of [`Encoding::pixel_layout`], one map for each
    /// row.
    fn conditions(&self, pixels: &Tensor) -> Vec<Conditions> {
        (0..pixels.size()[0]).map(|_| Conditions::new()).collect()
    }
}

/// Decodes latents.
pub trait ToPixels: Send {
    /// Returns pixels from the latents of a model, of any floating kind; they may go beyond -1 and
    /// 1.
    fn pixels(&self, latents: &Tensor) -> Tensor;
}

/// Stacks the conditions of several prompts: texts are padded with zeros to the longest, at least
/// one row, and get the masks of their tokens if `layout` says that they are unequal.
///
/// `layout`: that of any prompt of the family, [`Pipeline::prompt_shapes`].
pub fn stacked(conditions: &[Conditions], layout: &Layout) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    for (key, described) in layout {
        let rows: Vec<&Tensor> = conditions.iter().map(|row| &row[key]).collect();
        if !described.unequal {
            tensors.insert(key.clone(), Tensor::stack(&rows, 0));
            continue;
        }
        let lengths: Vec<i64> = rows.iter().map(|row| row.size()[0]).collect();
        let longest = lengths.iter().copied().max().unwrap_or_default().max(1);
        let padded = |row: &&Tensor| row.constant_pad_nd([0, 0, 0, longest - row.size()[0]]);
        let padded: Vec<Tensor> = rows.iter().map(padded).collect();
        tensors.insert(key.clone(), Tensor::stack(&padded, 0));
        if let Some((_, mask)) = TEXTS.iter().find(|(text, _)| text == key) {
            let places = Tensor::arange(longest, (Kind::Int64, Device::Cpu)).unsqueeze(0);
            let is_token = places.lt_tensor(&Tensor::from_slice(&lengths).unsqueeze(1));
            tensors.insert((*mask).into(), is_token.to_kind(Kind::Int64));
        }
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::group::SampleTensor;

    #[test]
    fn unequal_texts_are_stacked_with_their_masks_and_equal_ones_without() {
        let ones = |rows: i64| Tensor::ones([rows, 2], (Kind::Half, Device::Cpu));
        let layout = |unequal| SampleTensor { kind: Kind::Half, shape: vec![1, 2], unequal };
        let (text, second, pooled) = ("text_embeddings", "text_embeddings_2", "pooled");
        let conditions = [3, 1].map(|rows| {
            let tensors = [(text, rows), (second, 0), (pooled, 1)];
            tensors.map(|(key, rows)| (key.to_string(), ones(rows))).into()
        });
        let layout = [(text, true), (second, true), (pooled, false)]
            .map(|(key, unequal)| (key.to_string(), layout(unequal)));
        let found = stacked(&conditions, &layout.into());
        assert_eq!(found[text].size(), [2, 3, 2]);
        assert_eq!(found[text].sum(Kind::Float).double_value(&[]), 8.0);
        let rows = |key: &str| Vec::<Vec<i64>>::try_from(&found[key]).expect("a mask");
        assert_eq!(rows("text_mask"), [[1, 1, 1], [1, 0, 0]]);
        assert_eq!(rows("text_mask_2"), [[0], [0]]);
        assert_eq!((found[second].size(), found[pooled].size()), (vec![2, 1, 2], vec![2, 1, 2]));
        assert_eq!(found.len(), 5);
    }
}
