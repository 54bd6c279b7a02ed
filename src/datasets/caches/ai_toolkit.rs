//! The cache of ai-toolkit: beside the pictures, `_latent_cache/<picture>_<hash>.safetensors` with
//! normalized latents and `_t_e_cache/<picture>_<hash>.safetensors` with the text; captions are
//! `<picture>.txt`. It does not name its family.
//!
//! Source: ai-toolkit, `toolkit/dataloader_mixins.py` and `PromptEmbeds` of
//! `toolkit/prompt_utils.py`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::file::CacheFile;
use super::sample::{Cached, Collector, How};
use super::{ImportRequest, read_caption};
use crate::data::Caption;
use crate::datasets::index::find as find_files;
use crate::datasets::parallel::in_parallel;
use crate::error::{Error, Result};

const LATENTS: &str = "_latent_cache";
const TEXTS: &str = "_t_e_cache";
/// `_` and an MD5 of 128 bits in base64 without padding.
const HASH_BYTES: usize = 23;
/// Axes of one video's latents.
const VIDEO_AXES: usize = 4;

/// A folder of pictures and the name of one of them.
type Item = (PathBuf, String);

/// Finds the samples of a folder of pictures, or of several below it.
///
/// # Errors
/// [`Error::Data`] if a file is malformed, or latents have no text or several.
pub fn find(folder: &Path, request: &ImportRequest) -> Result<Vec<Cached>> {
    let mut files = Vec::new();
    find_files(folder, "safetensors", &mut files)?;
    let mut texts: BTreeMap<Item, Vec<&PathBuf>> = BTreeMap::new();
    for path in files.iter().filter(|path| lies_in(path, TEXTS)) {
        texts.entry(item(path)?).or_default().push(path);
    }
    let latents: Vec<&PathBuf> = files.iter().filter(|path| lies_in(path, LATENTS)).collect();
    in_parallel(&latents, request.jobs, |path| sample(path, item(path)?, &texts))
}
fn lies_in(path: &Path, folder: &str) -> bool {
    path.parent().and_then(Path::file_name) == Some(OsStr::new(folder))
}

/// Returns the folder of the picture and its name without ending.
fn item(path: &Path) -> Result<Item> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = stem.len().checked_sub(HASH_BYTES).and_then(|length| stem.get(..length));
    let Some(name) = name else {
        return Err(Error::data(path, "is not named `<picture>_<hash>`, as ai-toolkit does"));
    };
    let folder = path.parent().and_then(Path::parent).unwrap_or(Path::new("."));
    Ok((folder.into(), name.into()))
}

fn sample(path: &Path, item: Item, texts: &BTreeMap<Item, Vec<&PathBuf>>) -> Result<Cached> {
    let text = match texts.get(&item).map(Vec::as_slice) {
        Some([only]) => CacheFile::open(only)?,
        found => {
            let count = found.map_or(0, <[_]>::len);
            let what = format!(
                "has {count} files of text in {TEXTS}; expected one: cache texts to disk, and \
                 delete those of former captions"
            );
            return Err(Error::data(path, what));
        }
    };
    let mut collector = Collector::new();
    let latents = CacheFile::open(path)?;
    let (_, shape) = latents.describe("latent")?;
    let is_video = shape.iter().skip_while(|axis| **axis == 1).count() == VIDEO_AXES;
    let key = if is_video { "video_latents" } else { "image_latents" };
    collector.add(key, &latents, "latent", How::default())?;
    add_text(&mut collector, &text)?;
    let (folder, name) = item;
    let caption = folder.join(format!("{name}.txt"));
    let caption =
        if caption.is_file() { read_caption(&caption)?.trim().into() } else { String::new() };
    collector.finish(Caption::new(caption, name), None)
}

/// Adds a text without its padding, and the pooled embedding.
fn add_text(collector: &mut Collector, file: &CacheFile) -> Result<()> {
    if file.holds("text_embed_1") {
        let what = "holds embeddings of several encoders, which no family trains on";
        return Err(Error::data(file.path(), what));
    }
    let named = |name: &'static str, listed: &'static str| {
        if file.holds(name) { name } else { listed }
    };
    let (text, mask) =
        (named("text_embed", "text_embed_0"), named("attention_mask", "attention_mask_0"));
    let how = match file.holds(mask) {
        true => How::text(file.valid_tokens(mask)?),
        false => How::default(),
    };
    collector.add("text_embeddings", file, text, how)?;
    if file.holds("pooled_embed") {
        collector.add("pooled_prompt_embeds", file, "pooled_embed", How::default())?;
    }
    Ok(())
}
