//! The rows that are encoded: sound pictures or videos of a folder, each content once, and their
//! captions, each once.

use std::collections::BTreeMap;

use tch::Kind;

use super::samples::{Medium, Pair};
use crate::collective::Collective;
use crate::collective::agreement::{agree, agreed};
use crate::data::group::SampleTensor;
use crate::data::{LOSS_MASK, latents_key};
use crate::datasets::parallel::in_parallel;
use crate::datasets::pictures::{Examined, Found, Item, PictureOptions, find};
use crate::encoding::Pipeline;
use crate::error::{Error, Result};
use crate::pulse;

/// Key of the latents of control pictures.
pub(super) const CONTROL: &str = "condition_latents";

/// All that is encoded, and the samples that it becomes.
pub(super) struct Sources {
    pub found: Found,
    /// The empty prompt, and the captions in the order of the samples.
    pub texts: Vec<String>,
    pub media: Vec<Medium>,
    pub pairs: Vec<Pair>,
}

impl Sources {
    /// Finds the samples of a folder and reads each file whole, every rank its part.
    ///
    /// # Errors
    /// Errors of [`find`]; [`Error::Data`] if too large a share of the files is damaged, or pixels
    /// of a bucket have no latents.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn find(
        options: &PictureOptions,
        pipeline: &Pipeline,
        collective: &dyn Collective,
    ) -> Result<Self> {
        let found = agreed(find(options), collective)?;
        let examined = examined(&found, options, collective)?;
        let (found, contents) = agreed(found.sound(examined), collective)?;
        let mut sources =
            Sources { found, texts: vec![String::new()], media: Vec::new(), pairs: Vec::new() };
        agreed(sources.collect(&contents, pipeline, options.masks.is_some()), collective)?;
        Ok(sources)
    }

    /// `contents`: the hash of each item's content; `masks`: true if every item has a mask.
    fn collect(&mut self, contents: &[String], pipeline: &Pipeline, masks: bool) -> Result<()> {
        let mut texts = BTreeMap::from([(String::new(), 0)]);
        let mut media = BTreeMap::new();
        for (number, (item, content)) in self.found.items.iter().zip(contents).enumerate() {
            let medium = match media.get(content) {
                Some(medium) => *medium,
                None => {
                    let source = Source { item, content, masks };
                    self.media.push(source.medium(number, pipeline)?);
                    media.insert(content, self.media.len() - 1);
                    self.media.len() - 1
                }
            };
            for caption in &item.captions {
                let next = texts.len();
                let text = *texts.entry(caption.clone()).or_insert_with(|| {
                    self.texts.push(caption.clone());
                    next
                });
                self.pairs.push(Pair {
                    medium,
                    text,
                    source: item.name.clone(),
                    original: item.medium.original,
                    crop: item.medium.fit.crop,
                });
            }
        }
        Ok(())
    }
}

/// Returns what every item is after it has been read whole.
fn examined(
    found: &Found,
    options: &PictureOptions,
    collective: &dyn Collective,
) -> Result<Vec<Examined>> {
    let (rank, ranks) = (collective.rank(), collective.world_size());
    let own: Vec<usize> = (0..found.items.len()).skip(rank).step_by(ranks).collect();
    let bar = super::work::progress("files read", own.len() as u64, pulse::is_root(rank));
    let outcomes = in_parallel(&own, options.jobs, |index| {
        let outcome = found.examine(*index);
        bar.inc(1);
        outcome
    });
    bar.finish_and_clear();
    // An error is told at once, and not when all others have read their files.
    let told = serde_json::to_string(&outcomes?).expect("texts are JSON");
    let told = agree(Ok(told), collective)?;
    let parts: Vec<Vec<Examined>> =
        told.iter().map(|part| serde_json::from_str(part).expect("a rank wrote it")).collect();
    let count: usize = parts.iter().map(Vec::len).sum();
    if count != found.items.len() {
        let what = "changed while the ranks looked at it";
        return Err(Error::data(&options.folder, what));
    }
    let mut parts: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
    Ok((0..count).filter_map(|number| parts[number % ranks].next()).collect())
}

/// A picture or video, and what its tensors are made of.
struct Source<'i> {
    item: &'i Item,
    content: &'i str,
    masks: bool,
}

impl Source<'_> {
    /// Describes what it becomes.
    ///
    /// # Errors
    /// [`Error::Data`] if there are no latents for its bucket.
    fn medium(&self, number: usize, pipeline: &Pipeline) -> Result<Medium> {
        let item = self.item;
        let size = item.medium.fit.size;
        let sides = [i64::from(size.height), i64::from(size.width)];
        let frames = item.frames.map(|frames| frames as i64);
        let pixels: Vec<i64> = [Some(3), frames].into_iter().flatten().chain(sides).collect();
        let refused = |what| {
            Error::data(&item.medium.path, format!("goes to {size} pixels: the family {what}"))
        };
        let latents = pipeline.latents_shape(&pixels).map_err(refused)?;
        let patch = pipeline.family().patch;
        if latents.iter().rev().take(2).any(|side| side % patch != 0) {
            let multiple = pipeline.factors().space * patch;
            return Err(refused(format!("takes sides that are multiples of {multiple}")));
        }
        // Half has more digits than bfloat16 where latents lie, and the reference stores them in
        // it.
        let kind = if pipeline.kind() == Kind::Float { Kind::Float } else { Kind::Half };
        let tensor = |shape: &[i64]| SampleTensor { kind, shape: shape.to_vec(), unequal: false };
        let mut layout = pipeline.pixel_shapes();
        if self.masks {
            layout.insert(LOSS_MASK.into(), tensor(&latents[latents.len() - 2..]));
        }
        if !item.controls.is_empty() {
            let mut shape = latents.clone();
            shape[0] *= item.controls.len() as i64;
            layout.insert(CONTROL.into(), tensor(&shape));
        }
        layout.insert(latents_key(pipeline.family().data_type).into(), tensor(&latents));
        Ok(Medium { item: number, content: self.content.into(), pixels, layout })
    }
}
