//! FLUX.1: T5's states of all 512 rows, padding included and seen, and CLIP's pooled vector.
//! Latents are drawn.
//!
//! Source: diffusers 0.42.1, `FluxPipeline`; NeMo AutoModel 0.7.0 for what datasets hold.

use tch::{Device, Kind};

use super::latents::{Extent, Latents, VAE};
use super::texts::{FIRST, LoadedTexts, POOLED, SECOND, TEXT, Texts};
use super::{Conditions, Encoding, Facts, Folder, PICTURES, ToConditions, ToLatents, ToPixels};
use crate::autoencoder::Factors;
use crate::data::DataType;
use crate::data::group::{Layout, SampleTensor};
use crate::encoder::Output;
use crate::error::Result;

pub const FACTS: Facts = Facts {
    data_type: DataType::Image,
    parts: &[VAE, FIRST[1], SECOND[1], FIRST[0], SECOND[0]],
    optional_parts: &[],
    buckets: PICTURES,
    patch: 2,
    open: |folder| Ok(Box::new(Flux::open(folder)?)),
};

/// Tokens of T5 and of CLIP.
const TOKENS: usize = 512;
const CLIP_TOKENS: usize = 77;

#[derive(Debug)]
struct Flux {
    latents: Latents,
    clip: Texts,
    t5: Texts,
}

impl Flux {
    fn open(folder: &Folder) -> Result<Self> {
        Ok(Flux {
            latents: Latents::open(folder, "AutoencoderKL", Extent::Whole)?,
            clip: Texts::open(folder, FIRST, &["CLIPTextModel"])?,
            t5: Texts::open(folder, SECOND, &["T5EncoderModel"])?,
        })
    }
}

impl Encoding for Flux {
    fn factors(&self) -> Factors {
        self.latents.factors()
    }

    fn prompt_layout(&self, _prompt: &str, kind: Kind) -> Layout {
        let shape = vec![self.clip.encoder.width(&Output::Pooled)];
        let pooled = SampleTensor { kind, shape, unequal: false };
        let text = self.t5.layout(&Output::Last, TOKENS, kind);
        Layout::from([(TEXT.into(), text), (POOLED.into(), pooled)])
    }

    fn to_conditions(&self, device: Device, kind: Kind) -> Result<Box<dyn ToConditions>> {
        let clip = self.clip.load(Output::Pooled, device, kind)?;
        Ok(Box::new(Loaded { clip, t5: self.t5.load(Output::Last, device, kind)? }))
    }

    fn to_latents(&self, device: Device, kind: Kind) -> Result<Box<dyn ToLatents>> {
        self.latents.to_latents(device, kind)
    }

    fn to_pixels(&self, device: Device, kind: Kind) -> Result<Box<dyn ToPixels>> {
        self.latents.to_pixels(device, kind)
    }
}

struct Loaded {
    clip: LoadedTexts,
    t5: LoadedTexts,
}

impl ToConditions for Loaded {
    /// `text_embeddings` `[512, D]`, `pooled_prompt_embeds` `[P]`.
    fn conditions(&self, prompts: &[&str]) -> Result<Vec<Conditions>> {
        let ids = |texts: &LoadedTexts, most: usize| -> Vec<Vec<i64>> {
            prompts.iter().map(|prompt| texts.ids(prompt, most)).collect()
        };
        let clip_ids = ids(&self.clip, CLIP_TOKENS);
        let pooled = self.clip.encode(&clip_ids, CLIP_TOKENS, false)?;
        let states = self.t5.encode(&ids(&self.t5, TOKENS), TOKENS, false)?;
        let conditions = |row: i64| {
            Conditions::from([(TEXT.into(), states.get(row)), (POOLED.into(), pooled.get(row))])
        };
        Ok((0..prompts.len() as i64).map(conditions).collect())
    }
}
