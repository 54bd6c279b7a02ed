//! Qwen-Image: the last states of Qwen2.5-VL's text part without the template before the prompt,
//! stored without padding. Latents are drawn.
//!
//! Source: diffusers 0.42.1, `QwenImagePipeline.encode_prompt`; its own call cuts prompts at 512
//! tokens, and NeMo's datasets do not.

use tch::{Device, Kind};

use super::latents::{Extent, Latents, VAE};
use super::texts::{FIRST, LoadedTexts, TEXT, Texts};
use super::{Conditions, Encoding, Facts, Folder, PICTURES, ToConditions, ToLatents, ToPixels};
use crate::autoencoder::Factors;
use crate::data::DataType;
use crate::data::group::{Layout, SampleTensor};
use crate::encoder::Output;
use crate::error::Result;
use crate::tokenizer::prompt::{self, Templated};

pub const FACTS: Facts = Facts {
    data_type: DataType::Image,
    parts: &[VAE, FIRST[1], FIRST[0]],
    optional_parts: &[],
    buckets: PICTURES,
    patch: 2,
    open: |folder| Ok(Box::new(QwenImage::open(folder)?)),
};

/// Most tokens from the prompt on.
const MOST: usize = 1024;

#[derive(Debug)]
struct QwenImage {
    latents: Latents,
    texts: Texts,
}

impl QwenImage {
    fn open(folder: &Folder) -> Result<Self> {
        Ok(QwenImage {
            latents: Latents::open(folder, "AutoencoderKLQwenImage", Extent::Whole)?,
            texts: Texts::open(folder, FIRST, &["Qwen2_5_VLForConditionalGeneration"])?,
        })
    }
}

impl Encoding for QwenImage {
    fn factors(&self) -> Factors {
        self.latents.factors()
    }

    fn prompt_layout(&self, prompt: &str, kind: Kind) -> Layout {
        let tokens = self.texts.kept(&prompt::qwen_image(prompt), MOST);
        let layout = self.texts.layout(&Output::Last, tokens, kind);
        Layout::from([(TEXT.into(), SampleTensor { unequal: true, ..layout })])
    }

    fn to_conditions(&self, device: Device, kind: Kind) -> Result<Box<dyn ToConditions>> {
        Ok(Box::new(Loaded(self.texts.load(Output::Last, device, kind)?)))
    }

    fn to_latents(&self, device: Device, kind: Kind) -> Result<Box<dyn ToLatents>> {
        self.latents.to_latents(device, kind)
    }

    fn to_pixels(&self, device: Device, kind: Kind) -> Result<Box<dyn ToPixels>> {
        self.latents.to_pixels(device, kind)
    }
}

struct Loaded(LoadedTexts);

impl ToConditions for Loaded {
    /// `text_embeddings` `[L, D]`.
    fn conditions(&self, prompts: &[&str]) -> Result<Vec<Conditions>> {
        let chats: Vec<Templated> =
            prompts.iter().map(|prompt| prompt::qwen_image(prompt)).collect();
        let states = self.0.encode_chats(&chats, MOST)?.into_iter();
        Ok(states.map(|states| Conditions::from([(TEXT.into(), states)])).collect())
    }
}
