//! The cache of diffusion-pipe: `<dataset>/cache/<model>/` has a folder of latents for each size,
//! `cache_<ratio>x<width>x<height>x<frames>/latents`, and one of texts for each aspect ratio and
//! text encoder, `ar_frames_<ratio>_<frames>/text_embeddings_<encoder>`, or beside the latents
//! where sizes are given. Records of latents have their captions; those of texts have the picture
//! that they belong to, in the order of its captions.
//!
//! Before commit 8c63bd7, diffusion-pipe cached HunyuanVideo 1.5's latents before normalization, as
//! it did other models' whose latents are scaled outside of the VAE. No record tells which they
//! are: shards that are older than the commit hold such latents, and are scaled here. The VAE of
//! FLUX.2 normalizes by itself; latents that are not normalized all the same show it by their
//! spread, and are refused as those of every trainer.
//!
//! Source: diffusion-pipe 8f83dbf, `utils/dataset.py` and `models/`.

mod database;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tch::Kind;

use super::ImportRequest;
use super::family::{HUNYUAN_SCALE, named_family};
use super::file::{CacheFile, Location};
use super::sample::{Cached, Change, Collector, How, KnownFrames};
use crate::data::{Caption, latents_key};
use crate::datasets::index::find as find_files;
use crate::datasets::parallel::in_parallel;
use crate::encoding::Family;
use crate::error::{Error, Result};
use crate::files::pickle::Value;
use crate::flow::LOSS_MASK;
use database::records;

const LATENTS: &str = "latents";
const TEXTS: &str = "text_embeddings_";
/// Families by the names of the folders below `cache`.
const FAMILIES: [(&str, Family); 13] = [
    ("flux", Family::Flux),
    ("flux2", Family::Flux2),
    ("flux2_klein_4b", Family::Flux2),
    ("flux2_klein_9b", Family::Flux2),
    ("qwen_image", Family::QwenImage),
    ("wan", Family::Wan),
    ("wan_i2v", Family::Wan),
    ("wan_flf2v", Family::Wan),
    ("wan2.2_i2v", Family::Wan),
    ("wan2.2_5b", Family::Wan),
    ("skyreels_v2", Family::Wan),
    ("skyreels_v2_i2v", Family::Wan),
    ("hunyuan_video_1.5", Family::HunyuanVideo15),
];
/// Folder of the only model whose last frame is known, too.
const FIRST_AND_LAST: &str = "wan_flf2v";
/// Tokens of FLUX.2's text; diffusion-pipe caches longer ones whole and trains on their beginning.
const FLUX2_TOKENS: i64 = 512;
/// Time of commit 8c63bd7, 2026-08-06 14:09:36 UTC.
const NORMALIZED_SINCE: i64 = 1_786_025_376;
const SCALED: &str = "latents of HunyuanVideo 1.5 were cached before 2026-08-06, when diffusion-pipe \
                      did not scale them; they are scaled by 1.03682";

/// A picture or video: the archive that it lies in, if any, and its path.
type Picture = (Option<String>, String);
/// The texts of one encoder: for each picture one record a caption.
type Texts = BTreeMap<Picture, Vec<Location>>;

/// Finds the samples of a dataset's folder, of its cache, or of one model's or size's cache: one
/// for each caption.
///
/// # Errors
/// [`Error::Data`] if a database or record is malformed, or latents have no text.
pub fn find(folder: &Path, request: &ImportRequest) -> Result<Vec<Cached>> {
    let mut databases = Vec::new();
    find_files(folder, "db", &mut databases)?;
    let of_latents = databases.iter().filter(|path| {
        path.file_name() == Some(OsStr::new(database::NAME))
            && path.parent().and_then(Path::file_name) == Some(OsStr::new(LATENTS))
    });
    let mut known: BTreeMap<PathBuf, Vec<Texts>> = BTreeMap::new();
    let mut found = Vec::new();
    for path in of_latents {
        let size = Size::new(path, request)?;
        let folder = size.folder_of_texts();
        if !known.contains_key(&folder) {
            known.insert(folder.clone(), texts_of(&folder, request.jobs)?);
        }
        let texts = &known[&folder];
        let samples =
            in_parallel(&records(path)?, request.jobs, |record| size.samples(record, texts))?;
        found.extend(samples.into_iter().flatten());
    }
    let masked = found.iter().find_map(|cached| cached.sample.layout.get(LOSS_MASK));
    if let Some(kind) = masked.map(|mask| mask.kind) {
        let unmasked = |cached: &&mut Cached| !cached.sample.layout.contains_key(LOSS_MASK);
        found.iter_mut().filter(unmasked).for_each(|cached| cached.add_full_loss_mask(kind));
    }
    Ok(found)
}

/// Returns the texts below a folder, one for each encoder.
fn texts_of(folder: &Path, jobs: usize) -> Result<Vec<Texts>> {
    let encoders = (1..).map(|encoder| folder.join(format!("{TEXTS}{encoder}/{}", database::NAME)));
    encoders.take_while(|path| path.is_file()).map(|path| texts(&path, jobs)).collect()
}

fn texts(database: &Path, jobs: usize) -> Result<Texts> {
    let records = records(database)?;
    let pictures = in_parallel(&records, jobs, |record| picture(&CacheFile::at(record)?))?;
    let mut texts = Texts::new();
    for (picture, record) in pictures.into_iter().zip(records) {
        texts.entry(picture).or_default().push(record);
    }
    Ok(texts)
}

fn picture(record: &CacheFile) -> Result<Picture> {
    let named = match record.value("image_spec").and_then(Value::list) {
        Some([archive, path]) => {
            path.text().map(|path| (archive.text().map(ToString::to_string), path.to_string()))
        }
        _ => None,
    };
    named.ok_or_else(|| {
        let what = format!("has a record without its `image_spec`; it has {}", record.names());
        Error::data(record.path(), what)
    })
}

/// The latents of one size.
struct Size<'d> {
    /// The folder that holds them.
    folder: &'d Path,
    model: String,
    family: Family,
}

impl<'d> Size<'d> {
    fn new(database: &'d Path, request: &ImportRequest) -> Result<Self> {
        let folder = database.ancestors().nth(2).unwrap_or(Path::new("."));
        // Names of folders above the one that was given count, too.
        let real = folder.canonicalize().map_err(Error::storage(folder, "find"))?;
        let model = real.parent().and_then(Path::file_name).unwrap_or_default();
        let model = model.to_string_lossy().into_owned();
        let what = "the folder of its cache";
        let family = named_family(&model, what, &FAMILIES, request.family, database)?;
        Ok(Size { folder, model, family })
    }

    /// Returns the folder of the texts: of the aspect ratio that the size was made from, or the
    /// size's own.
    fn folder_of_texts(&self) -> PathBuf {
        let name = self.folder.file_name().unwrap_or_default().to_string_lossy();
        let parts: Vec<&str> = name.trim_start_matches("cache_").split('x').collect();
        match parts[..] {
            [ratio, _, _, frames] => {
                self.folder.with_file_name(format!("ar_frames_{ratio}_{frames}"))
            }
            _ => self.folder.to_path_buf(),
        }
    }

    /// Returns one sample for each caption of a record of latents.
    fn samples(&self, record: &Location, texts: &[Texts]) -> Result<Vec<Cached>> {
        let latents = CacheFile::at(record)?;
        let picture = picture(&latents)?;
        let of_encoder = |texts: &Texts| texts.get(&picture).cloned().unwrap_or_default();
        let of_encoders: Vec<Vec<Location>> = texts.iter().map(of_encoder).collect();
        let captions = match latents.value("caption").and_then(Value::list) {
            Some(captions) => captions.iter().map(|text| text.text().unwrap_or_default()).collect(),
            None => vec![latents.text("caption").unwrap_or_default()],
        };
        let counts: Vec<usize> = of_encoders.iter().map(Vec::len).collect();
        if counts.is_empty() || counts.iter().any(|count| *count != captions.len()) {
            let what = format!(
                "has {} captions for {}, and {} has {counts:?} texts of it, by encoder; let \
                 diffusion-pipe cache texts anew, with cache_text_embeddings = true",
                captions.len(),
                picture.1,
                self.folder_of_texts().display()
            );
            return Err(Error::data(&record.path, what));
        }
        let name = Path::new(&picture.1).file_name().unwrap_or_default().to_string_lossy();
        let sample = |(number, caption): (usize, &&str)| {
            let own: Vec<&Location> = of_encoders.iter().map(|texts| &texts[number]).collect();
            let caption = Caption::new(*caption, name.to_string());
            self.sample(&latents, &own, caption)
        };
        captions.iter().enumerate().map(sample).collect()
    }

    fn sample(&self, latents: &CacheFile, texts: &[&Location], caption: Caption) -> Result<Cached> {
        let unscaled = self.is_unscaled(latents.path())?;
        let mut collector = Collector::new();
        let how =
            if unscaled { How::changed(Change::Scale(HUNYUAN_SCALE)) } else { How::default() };
        collector.add(latents_key(self.family.data_type), latents, "latents", how)?;
        self.add_conditions(&mut collector, latents)?;
        if latents.holds("mask") {
            let shape = &collector.layout[latents_key(self.family.data_type)].shape;
            let size = [shape[shape.len() - 2], shape[shape.len() - 1]];
            collector.add(LOSS_MASK, latents, "mask", How::changed(Change::Shrink(size)))?;
        }
        for location in texts {
            self.add_text(&mut collector, &CacheFile::at(location)?)?;
        }
        let mut cached = collector.finish(caption, Some(self.family))?;
        cached.note = unscaled.then_some(SCALED);
        Ok(cached)
    }

    fn is_unscaled(&self, shard: &Path) -> Result<bool> {
        let time = fs::metadata(shard).map_err(Error::storage(shard, "inspect"))?.mtime();
        Ok(self.family == Family::HunyuanVideo15 && time < NORMALIZED_SINCE)
    }

    /// Adds what a video begins with, if the model is given it.
    fn add_conditions(&self, collector: &mut Collector, latents: &CacheFile) -> Result<()> {
        if latents.holds("control_latents") {
            let what = "holds latents of a control picture, which no family trains on";
            return Err(Error::data(latents.path(), what));
        }
        if latents.holds("y") {
            let known = match self.model == FIRST_AND_LAST {
                true => KnownFrames::FirstAndLast,
                false => KnownFrames::First,
            };
            let how = How::changed(Change::MarkKnown(known));
            collector.add("condition_latents", latents, "y", how)?;
        }
        if latents.holds("clip_context") {
            collector.add("image_embeds", latents, "clip_context", How::default())?;
        }
        Ok(())
    }

    /// Adds the tensors of one text encoder.
    fn add_text(&self, collector: &mut Collector, file: &CacheFile) -> Result<()> {
        const TEXT: &str = "text_embeddings";
        let unpadded = How { unequal: true, ..How::default() };
        match self.family {
            Family::Flux if file.holds("clip_embed") => {
                collector.add("pooled_prompt_embeds", file, "clip_embed", How::default())
            }
            Family::Flux => collector.add(TEXT, file, "t5_embed", How::default()),
            Family::Flux2 => {
                let (_, shape) = file.describe("text_embeds_0")?;
                let tokens = shape.iter().rev().nth(1).copied().unwrap_or_default();
                let how = How { tokens: Some(tokens.min(FLUX2_TOKENS)), ..How::default() };
                collector.add(TEXT, file, "text_embeds_0", how)
            }
            Family::QwenImage => collector.add(TEXT, file, "prompt_embeds", unpadded),
            Family::Wan => {
                let length = file.read("seq_lens")?.to_kind(Kind::Int64).sum(Kind::Int64);
                let how = How::text(length.int64_value(&[]));
                collector.add(TEXT, file, "text_embeddings", how)
            }
            Family::HunyuanVideo15 => {
                for (key, text, mask) in [
                    (TEXT, "text_embeds", "attention_mask"),
                    ("text_embeddings_2", "byt5_embeds", "byt5_attention_mask"),
                ] {
                    collector.add(key, file, text, How::text(file.valid_tokens(mask)?))?;
                }
                Ok(())
            }
            Family::Dit => unreachable!("no trainer has caches of it"),
        }
    }
}
