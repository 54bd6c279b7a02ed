//! HunyuanVideo 1.5: states of Qwen2.5-VL's text part two layers before the last, without the
//! template before the prompt; ByT5's states of the texts that a prompt quotes; and, where the
//! pipeline has an image encoder, its states of the first frame.
//!
//! Both texts are stored without padding, where the reference's datasets hold 1000 and 256 rows
//! with masks: the adapter drops the rows that no mask shows, so that both train alike.
//!
//! Source: diffusers 0.42.1, `HunyuanVideo15Pipeline` and `HunyuanVideo15ImageToVideoPipeline`.

use tch::{Device, Kind, Tensor};

use super::latents::{Extent, Latents, LoadedEncoder, VAE};
use super::texts::{FIRST, LoadedTexts, SECOND, SECOND_TEXT, TEXT, Texts};
use super::{Conditions, Encoding, Facts, Folder, ToConditions, ToLatents, ToPixels, VIDEOS};
use crate::autoencoder::Factors;
use crate::data::DataType;
use crate::data::group::{Layout, SampleTensor};
use crate::encoder::{ImageEncoder, LoadedImageEncoder, Output, pixels_of};
use crate::error::Result;
use crate::rng::Stream;
use crate::tokenizer::prompt::{self, Templated};

pub const FACTS: Facts = Facts {
    data_type: DataType::Video,
    parts: &[VAE, FIRST[1], SECOND[1], FIRST[0], SECOND[0]],
    optional_parts: &[IMAGE_ENCODER, "feature_extractor"],
    buckets: VIDEOS,
    patch: 1,
    open: |folder| Ok(Box::new(HunyuanVideo15::open(folder)?)),
};

/// Most tokens from the prompt on, and of the quoted texts.
const MOST: usize = 1000;
const MOST_QUOTED: usize = 256;
/// Layers after the one whose states are taken.
const SKIPPED: usize = 2;
/// Folder of the image encoder, which pipelines of text to video lack, and its key in batches.
const IMAGE_ENCODER: &str = "image_encoder";
const IMAGE: &str = "image_embeds";

#[derive(Debug)]
struct HunyuanVideo15 {
    latents: Latents,
    texts: Texts,
    quotes: Texts,
    images: Option<ImageEncoder>,
}

impl HunyuanVideo15 {
    fn open(folder: &Folder) -> Result<Self> {
        let images = folder.has(IMAGE_ENCODER).then(|| folder.part(IMAGE_ENCODER));
        Ok(HunyuanVideo15 {
            latents: Latents::open(folder, "AutoencoderKLHunyuanVideo15", Extent::Tiles)?,
            texts: Texts::open(folder, FIRST, &["Qwen2_5_VLForConditionalGeneration"])?,
            quotes: Texts::open(folder, SECOND, &["T5EncoderModel"])?,
            images: images.map(|path| ImageEncoder::open(&path)).transpose()?,
        })
    }

    fn output(&self) -> Output {
        Output::Hidden(vec![self.texts.encoder.sizes().layers.saturating_sub(SKIPPED)])
    }
}

impl Encoding for HunyuanVideo15 {
    fn factors(&self) -> Factors {
        self.latents.factors()
    }

    fn prompt_layout(&self, prompt: &str, kind: Kind) -> Layout {
        let tokens = self.texts.kept(&prompt::hunyuan_video15(prompt), MOST);
        let text = self.texts.layout(&self.output(), tokens, kind);
        let quoted = prompt::quoted_texts(prompt);
        let tokens = quoted.map_or(0, |quoted| self.quotes.ids(&quoted, MOST_QUOTED).len());
        let quotes = self.quotes.layout(&Output::Last, tokens, kind);
        let unequal = |layout| SampleTensor { unequal: true, ..layout };
        Layout::from([(TEXT.into(), unequal(text)), (SECOND_TEXT.into(), unequal(quotes))])
    }

    fn pixel_layout(&self, kind: Kind) -> Layout {
        let layout = |images: &ImageEncoder| {
            let shape = images.states().to_vec();
            (IMAGE.to_string(), SampleTensor { kind, shape, unequal: false })
        };
        self.images.iter().map(layout).collect()
    }

    fn to_conditions(&self, device: Device, kind: Kind) -> Result<Box<dyn ToConditions>> {
        let texts = self.texts.load(self.output(), device, kind)?;
        let quotes = self.quotes.load(Output::Last, device, kind)?;
        let width = self.quotes.encoder.width(&Output::Last);
        let nothing = Tensor::zeros([0, width], (kind, Device::Cpu));
        Ok(Box::new(Loaded { texts, quotes, nothing }))
    }

    fn to_latents(&self, device: Device, kind: Kind) -> Result<Box<dyn ToLatents>> {
        let images = self.images.as_ref().map(|images| images.load(device, kind)).transpose()?;
        Ok(Box::new(LoadedFrames { encoder: self.latents.encoder(device, kind)?, images }))
    }

    fn to_pixels(&self, device: Device, kind: Kind) -> Result<Box<dyn ToPixels>> {
        self.latents.to_pixels(device, kind)
    }
}

struct Loaded {
    texts: LoadedTexts,
    quotes: LoadedTexts,
    /// The states of a prompt that quotes nothing, `[0, D]`.
    nothing: Tensor,
}

impl ToConditions for Loaded {
    /// `text_embeddings` `[L, D]`, `text_embeddings_2` `[L2, D2]`, of no rows where the prompt
    /// quotes nothing.
    fn conditions(&self, prompts: &[&str]) -> Result<Vec<Conditions>> {
        let chats: Vec<Templated> =
            prompts.iter().map(|prompt| prompt::hunyuan_video15(prompt)).collect();
        let states = self.texts.encode_chats(&chats, MOST)?;
        let quoted: Vec<Option<String>> =
            prompts.iter().map(|prompt| prompt::quoted_texts(prompt)).collect();
        let ids = |quoted: &String| self.quotes.ids(quoted, MOST_QUOTED);
        let ids: Vec<Vec<i64>> = quoted.iter().flatten().map(ids).collect();
        let mut of_quotes = match ids.is_empty() {
            true => Vec::new(),
            false => self.quotes.encode_unpadded(&ids)?,
        }
        .into_iter();
        let conditions = |(states, quoted): (Tensor, &Option<String>)| {
            let nothing = || self.nothing.shallow_clone();
            let quotes = quoted.as_ref().and_then(|_| of_quotes.next()).unwrap_or_else(nothing);
            Conditions::from([(TEXT.into(), states), (SECOND_TEXT.into(), quotes)])
        };
        Ok(states.into_iter().zip(&quoted).map(conditions).collect())
    }
}

struct LoadedFrames {
    encoder: LoadedEncoder,
    images: Option<LoadedImageEncoder>,
}

impl ToLatents for LoadedFrames {
    fn latents(&self, pixels: &Tensor, stream: &Stream) -> Tensor {
        self.encoder.latents(pixels, stream)
    }

    /// `image_embeds` `[L, D]` of the first frame.
    fn conditions(&self, pixels: &Tensor) -> Vec<Conditions> {
        let frames = if pixels.dim() == 5 { pixels.select(2, 0) } else { pixels.shallow_clone() };
        let Some(images) = &self.images else {
            return (0..frames.size()[0]).map(|_| Conditions::new()).collect();
        };
        let bytes = ((frames.to_device(Device::Cpu).to_kind(Kind::Float) + 1.0) * 127.5).round();
        let bytes = bytes.clamp(0.0, 255.0).to_kind(Kind::Uint8);
        let picture = |row: i64| pixels_of(&bytes.get(row), images.side());
        let pictures: Vec<Tensor> = (0..bytes.size()[0]).map(picture).collect();
        let states = images.encode(&Tensor::stack(&pictures, 0)).to_device(Device::Cpu);
        let conditions = |row: i64| Conditions::from([(IMAGE.into(), states.get(row))]);
        (0..states.size()[0]).map(conditions).collect()
    }
}
