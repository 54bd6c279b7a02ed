//! Qwen-Image: the last states of Qwen2.5-VL's text part without the template before the prompt,
//! stored without padding. Latents are drawn.
//!
//! Source: diffusers 0.42.1, `QwenImagePipeline.encode_prompt`; its own call cuts prompts at 512
//! tokens, and NeMo's datasets do not.

use tch::{Device, Kind};

use super::latents::{Extent, Latents, VAE};
use super::texts::{FIRST, LoadedTexts, TEXT, Texts};
use super::{Conditions, Encoding, Facts, Folder, ToConditions, ToLatents, ToPixels};
use crate::autoencoder::Factors;
use crate::data::DataType;
use crate::data::group::{Layout, SampleTensor};
use crate::encoder::Output;
use crate::error::Result;
use crate::tokenizer::prompt;

pub const FACTS: Facts = Facts {
    data_type: DataType::Image,
    parts: &[VAE, FIRST[1], FIRST[0]],
    open: |folder| Ok(Box::new(QwenImage::open(folder)?)),
};

/// Tokens of the template before the prompt, which are dropped.
const DROPPED: usize = 34;
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
        let tokens = self.texts.ids(&prompt::qwen_image(prompt), DROPPED + MOST).len();
        let layout = self.texts.layout(&Output::Last, tokens.saturating_sub(DROPPED), kind);
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
        let ids = |prompt: &&str| self.0.ids(&prompt::qwen_image(prompt), DROPPED + MOST);
        let states = self.0.encode_unpadded(&prompts.iter().map(ids).collect::<Vec<_>>())?;
        let conditions = |states: tch::Tensor| {
            let dropped = states.size()[0].min(DROPPED as i64);
            let kept = states.narrow(0, dropped, states.size()[0] - dropped);
            Conditions::from([(TEXT.into(), kept)])
        };
        Ok(states.into_iter().map(conditions).collect())
    }
}
