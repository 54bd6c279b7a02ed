//! The cache of musubi-tuner: safetensors files without an axis of samples, one of latents and one
//! of texts for each sample; names tell the architecture. Latents of HunyuanVideo 1.5 are unscaled.
//!
//! Source: musubi-tuner, `dataset/image_video_dataset.py`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::ImportRequest;
use super::family::HUNYUAN_SCALE;
use super::file::CacheFile;
use super::sample::{Cached, Change, Collector, How};
use crate::data::{Caption, latents_key};
use crate::datasets::index::find as find_files;
use crate::datasets::parallel::in_parallel;
use crate::encoding::Family;
use crate::error::{Error, Result};

/// Ending of the name of a file of texts.
const TEXT: &str = "_te";

/// A model whose cache is read.
struct Architecture {
    /// Its word in the names of files.
    word: &'static str,
    family: Family,
    /// What normalizes its latents.
    change: Change,
    /// True if `latents_image` are the model's condition; otherwise it is made from the latents.
    takes_condition: bool,
}

const fn plain(word: &'static str, family: Family) -> Architecture {
    Architecture { word, family, change: Change::None, takes_condition: false }
}

const ARCHITECTURES: [Architecture; 6] = [
    Architecture { takes_condition: true, ..plain("wan", Family::Wan) },
    plain("f2d", Family::Flux2),
    plain("f2k4b", Family::Flux2),
    plain("f2k9b", Family::Flux2),
    plain("qi", Family::QwenImage),
    Architecture { change: Change::Scale(HUNYUAN_SCALE), ..plain("hv15", Family::HunyuanVideo15) },
];

/// Finds the samples of a cache.
///
/// # Errors
/// [`Error::Data`] if a file is malformed, of another architecture, or has no file of texts.
pub fn find(folder: &Path, request: &ImportRequest) -> Result<Vec<Cached>> {
    let mut files = Vec::new();
    find_files(folder, "safetensors", &mut files)?;
    let named: BTreeMap<String, &PathBuf> =
        files.iter().map(|path| (path.with_extension("").display().to_string(), path)).collect();
    let latents: Vec<_> = named.iter().filter(|(name, _)| !name.ends_with(TEXT)).collect();
    in_parallel(&latents, request.jobs, |(name, path)| sample(path, name, &named))
}

fn sample(path: &Path, name: &str, named: &BTreeMap<String, &PathBuf>) -> Result<Cached> {
    let (before, word) = name.rsplit_once('_').unwrap_or((name, ""));
    let Some(architecture) = ARCHITECTURES.iter().find(|known| known.word == word) else {
        let words: Vec<&str> = ARCHITECTURES.iter().map(|known| known.word).collect();
        let what = format!(
            "is of architecture `{word}` by its name; expected one of {}",
            words.join(", ")
        );
        return Err(Error::data(path, what));
    };
    let (item, text) = text_file(before, word, named)
        .ok_or_else(|| Error::data(path, format!("has no file of texts `<name>_{word}{TEXT}`")))?;
    let mut collector = Collector::new();
    let (latents, texts) = (CacheFile::open(path)?, CacheFile::open(text)?);
    for file in [&latents, &texts] {
        add(&mut collector, file, architecture)?;
    }
    if collector.layout.len() < 2 {
        return Err(Error::data(path, "holds no latents, or its file of texts no text"));
    }
    let caption = |file: &CacheFile| file.safe()?.metadata().get("caption1").cloned();
    let source = Path::new(item).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let caption = caption(&texts).or(caption(&latents)).unwrap_or_default();
    collector.finish(Caption::new(caption, source), Some(architecture.family))
}

/// Returns the item's name and its file of texts: `<item>_<width>x<height>` names a picture,
/// `<item>_<start>-<frames>_<width>x<height>` a piece of a video.
fn text_file<'n>(
    before: &'n str,
    word: &str,
    named: &BTreeMap<String, &'n PathBuf>,
) -> Option<(&'n str, &'n Path)> {
    let (picture, _) = before.rsplit_once('_')?;
    let piece = picture.rsplit_once('_').filter(|(_, frames)| are_frames(frames));
    let piece = piece.map(|(item, _)| item);
    std::iter::once(picture).chain(piece).find_map(|item| {
        let path = named.get(&format!("{item}_{word}{TEXT}"))?;
        Some((item, path.as_path()))
    })
}

/// True for `<start>-<frames>`.
fn are_frames(text: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.split_once('-').is_some_and(|(start, frames)| is_number(start) && is_number(frames))
}

/// Adds the tensors of a file whose names say that they are read.
fn add(collector: &mut Collector, file: &CacheFile, architecture: &Architecture) -> Result<()> {
    let Some(safe) = file.safe() else { return Ok(()) };
    for info in safe.tensors() {
        let name = info.name.as_str();
        let how = |unequal| How { unequal, ..How::default() };
        let (key, how) = if name.starts_with("latents_control_") {
            let what = "holds latents of a control picture, which no family trains on";
            return Err(Error::data(file.path(), what));
        } else if name.starts_with("latents_image_") {
            if !architecture.takes_condition {
                continue;
            }
            ("condition_latents", how(false))
        } else if sizes_follow(name, "latents_") {
            (latents_key(architecture.family.data_type), How::changed(architecture.change))
        } else if name.starts_with("clip_") || name.starts_with("siglip_") {
            ("image_embeds", how(false))
        } else if name.starts_with("ctx_vec_") {
            ("text_embeddings", how(false))
        } else if name.starts_with("varlen_t5_") || name.starts_with("varlen_vl_embed_") {
            ("text_embeddings", how(true))
        } else if name.starts_with("varlen_byt5_embed_") {
            ("text_embeddings_2", how(true))
        } else {
            continue;
        };
        collector.add(key, file, name, how)?;
    }
    Ok(())
}

/// True if a digit follows the prefix, as the size of latents does.
fn sizes_follow(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The item whose texts are found for the latents `before`, where `cat` and a video have texts.
    fn item(before: &str) -> Option<String> {
        let path = &PathBuf::from("texts");
        let named = ["cat_qi_te", "film_qi_te"].map(|name| (name.to_string(), path));
        text_file(before, "qi", &BTreeMap::from(named)).map(|(item, _)| item.into())
    }

    #[test]
    fn a_piece_of_a_video_has_its_videos_texts_and_a_picture_no_others() {
        assert_eq!(item("cat_0512x0512"), Some("cat".into()));
        assert_eq!(item("film_00000-009_0512x0512"), Some("film".into()));
        assert_eq!(item("cat_1_0512x0512"), None, "another picture");
        assert_eq!(item("cat_1-b_0512x0512"), None);
    }
}
