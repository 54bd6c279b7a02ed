//! FLUX.2: three states of a language model side by side, of all 512 rows. Rows of padding are
//! given to the model, too, which knows no mask; no token saw them. They stand on the tokenizer's
//! own side. The model `dev` has Mistral's states, `klein` has Qwen3's.
//!
//! Source: diffusers 0.42.1, `Flux2Pipeline` and `Flux2KleinPipeline`.

use tch::{Device, Kind};

use super::latents::{Extent, Latents, VAE};
use super::texts::{FIRST, LoadedTexts, TEXT, Texts};
use super::{Conditions, Encoding, Facts, Folder, PICTURES, ToConditions, ToLatents, ToPixels};
use crate::autoencoder::Factors;
use crate::data::DataType;
use crate::data::group::Layout;
use crate::encoder::Output;
use crate::error::Result;
use crate::settings::Family;
use crate::tokenizer::prompt::{self, Templated};

pub const FACTS: Facts = Facts {
    data_type: DataType::Image,
    parts: &[VAE, FIRST[1], FIRST[0]],
    optional_parts: &[],
    buckets: PICTURES,
    patch: 1,
    open: |folder| Ok(Box::new(Flux2::open(folder)?)),
};

const TOKENS: usize = 512;
/// Class of the text encoder of `dev`, and of `klein`.
const MISTRAL: &str = "Mistral3ForConditionalGeneration";
const QWEN: &str = "Qwen3ForCausalLM";

/// The two lines of the family.
#[derive(Clone, Copy, Debug)]
enum Line {
    Dev,
    Klein,
}

impl Line {
    fn output(self) -> Output {
        match self {
            Line::Dev => Output::Hidden(vec![10, 20, 30]),
            Line::Klein => Output::Hidden(vec![9, 18, 27]),
        }
    }

    fn text(self, prompt: &str) -> Templated {
        match self {
            Line::Dev => prompt::flux2_dev(prompt),
            Line::Klein => prompt::flux2_klein(prompt),
        }
    }
}

#[derive(Debug)]
struct Flux2 {
    latents: Latents,
    texts: Texts,
    line: Line,
}

impl Flux2 {
    fn open(folder: &Folder) -> Result<Self> {
        let texts = Texts::open(folder, FIRST, &[MISTRAL, QWEN])?;
        let line = if texts.encoder.class().name() == MISTRAL { Line::Dev } else { Line::Klein };
        let latents = Latents::open(folder, "AutoencoderKLFlux2", Extent::Whole)?;
        Ok(Flux2 { latents, texts, line })
    }
}

impl Encoding for Flux2 {
    fn factors(&self) -> Factors {
        self.latents.factors()
    }

    fn prompt_layout(&self, _prompt: &str, kind: Kind) -> Layout {
        Layout::from([(TEXT.into(), self.texts.layout(&self.line.output(), TOKENS, kind))])
    }

    fn to_conditions(&self, device: Device, kind: Kind) -> Result<Box<dyn ToConditions>> {
        let texts = self.texts.load(self.line.output(), device, kind)?;
        Ok(Box::new(Loaded { texts, line: self.line }))
    }

    fn to_latents(&self, device: Device, kind: Kind) -> Result<Box<dyn ToLatents>> {
        self.latents.to_latents(device, kind)
    }

    fn to_pixels(&self, device: Device, kind: Kind) -> Result<Box<dyn ToPixels>> {
        self.latents.to_pixels(device, kind)
    }
}

struct Loaded {
    texts: LoadedTexts,
    line: Line,
}

impl ToConditions for Loaded {
    /// `text_embeddings` `[512, 3 · D]`.
    fn conditions(&self, prompts: &[&str]) -> Result<Vec<Conditions>> {
        let ids = |prompt: &&str| self.texts.ids_of_chat(&self.line.text(prompt), TOKENS);
        let ids: Vec<Vec<i64>> = prompts.iter().map(ids).collect();
        let states = self.texts.encode(&ids, TOKENS, true)?;
        let conditions = |row: i64| Conditions::from([(TEXT.into(), states.get(row))]);
        Ok((0..prompts.len() as i64).map(conditions).collect())
    }
}
