//! Encoded samples: where the tensors of each lie, and how the dataset holds them.

use std::collections::BTreeMap;

use tch::Tensor;

use super::batches::Batches;
use super::store::{Row, Store};
use crate::data::Caption;
use crate::data::group::Layout;
use crate::datasets::{Sample, Samples};
use crate::encoding::Pipeline;
use crate::error::Result;
use crate::media::{CropOffset, Size};

/// A text that is encoded once, however many samples have it.
#[derive(Clone, Debug)]
pub(super) struct Text {
    pub text: String,
    pub layout: Layout,
}

impl Text {
    pub fn new(text: &str, pipeline: &Pipeline) -> Self {
        Text { text: text.into(), layout: pipeline.prompt_shapes(text) }
    }

    /// Rows of all its tensors.
    pub fn tokens(&self) -> u64 {
        let rows = self.layout.values().filter(|tensor| tensor.shape.len() > 1);
        rows.map(|tensor| tensor.shape[0] as u64).sum::<u64>().max(1)
    }
}

/// A picture or video that is encoded once.
#[derive(Clone, Debug)]
pub(super) struct Medium {
    /// Number of the item that is read.
    pub item: usize,
    /// Hash of all that its tensors are made of.
    pub content: String,
    /// Shape of its pixels.
    pub pixels: Vec<i64>,
    pub layout: Layout,
}

/// Side of the square of pixels that counts as a token.
const TOKEN_SIDE: i64 = 16;

impl Medium {
    pub fn tokens(&self) -> u64 {
        let pixels: i64 = self.pixels[1..].iter().product();
        (pixels / (TOKEN_SIDE * TOKEN_SIDE)).max(1) as u64
    }
}

/// A sample before it is described: numbers of its medium and of its text.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub medium: usize,
    pub text: usize,
    /// Name of the picture or video, its size, and what was cut off once it was resized.
    pub source: String,
    pub original: Size,
    pub crop: CropOffset,
}

/// The samples of a dataset, their tensors in a store.
pub(super) struct Encoded<'s> {
    store: &'s Store,
    list: Vec<Sample>,
    pairs: Vec<Pair>,
    texts: Vec<(Row, Layout)>,
    media: Vec<(Row, Layout)>,
}

impl<'s> Encoded<'s> {
    /// `plan`: names the pipeline and everything else that decides the tensors.
    pub fn new(
        store: &'s Store,
        plan: &str,
        (texts, of_texts): (&[Text], &Batches),
        (media, of_media): (&[Medium], &Batches),
        pairs: Vec<Pair>,
    ) -> Self {
        let sample = |pair: &Pair| {
            let (text, medium) = (&texts[pair.text], &media[pair.medium]);
            let Pair { original, crop, source, .. } = pair;
            let caption = Caption {
                original_resolution: Some([original.width, original.height]),
                crop_offset: Some([crop.left, crop.top]),
                ..Caption::new(&text.text, source)
            };
            let layout = medium.layout.iter().chain(&text.layout);
            let layout = layout.map(|(key, tensor)| (key.clone(), tensor.clone())).collect();
            // The text stands in the caption.
            Sample { layout, caption, origin: format!("{} {plan}", medium.content) }
        };
        let list = pairs.iter().map(sample).collect();
        let texts_at = of_texts.places(texts.len()).into_iter();
        let media_at = of_media.places(media.len()).into_iter();
        Encoded {
            store,
            list,
            pairs,
            texts: texts_at.zip(texts).map(|(row, text)| (row, text.layout.clone())).collect(),
            media: media_at.zip(media).map(|(row, medium)| (row, medium.layout.clone())).collect(),
        }
    }

    /// Reads the tensors of a text.
    ///
    /// # Errors
    /// Errors of reading.
    pub fn text(&self, number: usize) -> Result<BTreeMap<String, Tensor>> {
        let (row, layout) = &self.texts[number];
        self.store.read(row, layout)
    }
}

impl Samples for Encoded<'_> {
    fn list(&self) -> &[Sample] {
        &self.list
    }

    fn read(&self, index: usize) -> Result<BTreeMap<String, Tensor>> {
        let Pair { medium, text, .. } = &self.pairs[index];
        let (row, layout) = &self.media[*medium];
        let mut tensors = self.store.read(row, layout)?;
        tensors.extend(self.text(*text)?);
        Ok(tensors)
    }
}
