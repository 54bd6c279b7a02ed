//! Wan: UMT5's last states of a cleaned prompt, and zeros up to 512 rows, which the model sees.
//!
//! Source: diffusers 0.42.1, `WanPipeline`, whose call pads to 512. NeMo's datasets have the 226
//! rows of the default of `encode_prompt`, with which no published model is sampled.

use tch::{Device, Kind, Tensor};

use super::latents::{Extent, Latents, VAE};
use super::texts::{FIRST, LoadedTexts, TEXT, Texts};
use super::{Conditions, Encoding, Facts, Folder, ToConditions, ToLatents, ToPixels, VIDEOS};
use crate::autoencoder::Factors;
use crate::data::DataType;
use crate::data::group::Layout;
use crate::encoder::Output;
use crate::error::Result;
use crate::tokenizer::prompt;

pub const FACTS: Facts = Facts {
    data_type: DataType::Video,
    parts: &[VAE, FIRST[1], FIRST[0]],
    optional_parts: &[],
    buckets: VIDEOS,
    patch: 2,
    open: |folder| Ok(Box::new(Wan::open(folder)?)),
};

const TOKENS: usize = 512;

#[derive(Debug)]
struct Wan {
    latents: Latents,
    texts: Texts,
}

impl Wan {
    fn open(folder: &Folder) -> Result<Self> {
        Ok(Wan {
            latents: Latents::open(folder, "AutoencoderKLWan", Extent::Tiles)?,
            texts: Texts::open(folder, FIRST, &["UMT5EncoderModel"])?,
        })
    }
}

impl Encoding for Wan {
    fn factors(&self) -> Factors {
        self.latents.factors()
    }

    fn prompt_layout(&self, _prompt: &str, kind: Kind) -> Layout {
        Layout::from([(TEXT.into(), self.texts.layout(&Output::Last, TOKENS, kind))])
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
    /// `text_embeddings` `[512, D]`.
    fn conditions(&self, prompts: &[&str]) -> Result<Vec<Conditions>> {
        let ids = |prompt: &&str| self.0.ids(&prompt::wan(prompt), TOKENS);
        let states = self.0.encode_unpadded(&prompts.iter().map(ids).collect::<Vec<_>>())?;
        let conditions = |states: Tensor| {
            let missing = TOKENS as i64 - states.size()[0];
            Conditions::from([(TEXT.into(), states.constant_pad_nd([0, 0, 0, missing]))])
        };
        Ok(states.into_iter().map(conditions).collect())
    }
}
