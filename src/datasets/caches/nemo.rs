//! The cache of NVIDIA NeMo AutoModel: one file of `torch.save` for each sample, listed in
//! `metadata.json` and its shards, or a flat folder of such files. Its caches for editing pictures
//! hold ordered context latents, which no family here trains on; they are refused.
//!
//! Source: NeMo AutoModel 0.7.0, `tools/diffusion` and `components/datasets/diffusion`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::ImportRequest;
use super::family::named_family;
use super::file::CacheFile;
use super::sample::{Cached, Collector, How};
use crate::data::Caption;
use crate::datasets::index::find as find_files;
use crate::datasets::parallel::in_parallel;
use crate::encoding::Family;
use crate::error::{Error, Result};
use crate::files::contents::no_json;
use crate::files::pickle::Value;
use crate::files::safetensors::open_error;

/// Largest list of samples that is read; a row takes about 500 bytes.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Keys of the cache, and those of batches.
const KEYS: [(&str, &str); 9] = [
    ("latent", "image_latents"),
    ("video_latents", "video_latents"),
    ("prompt_embeds", "text_embeddings"),
    ("text_embeddings", "text_embeddings"),
    ("pooled_prompt_embeds", "pooled_prompt_embeds"),
    ("text_mask", "text_mask"),
    ("text_embeddings_2", "text_embeddings_2"),
    ("text_mask_2", "text_mask_2"),
    ("image_embeds", "image_embeds"),
];
/// Families by NeMo's `model_type`.
const FAMILIES: [(&str, Family); 7] = [
    ("flux", Family::Flux),
    ("flux2", Family::Flux2),
    ("qwen_image", Family::QwenImage),
    ("wan", Family::Wan),
    ("wan22", Family::Wan),
    ("hunyuanvideo", Family::HunyuanVideo15),
    ("hunyuan", Family::HunyuanVideo15),
];
/// Keys of samples for editing pictures.
const EDIT_KEYS: [&str; 2] = ["target_latent", "context_latents"];

#[derive(Deserialize)]
struct Metadata {
    shards: Vec<String>,
    model_type: Option<String>,
}

/// One sample's row; further fields concern NeMo's sampler.
#[derive(Deserialize)]
struct Row {
    cache_file: String,
    #[serde(default)]
    prompt: String,
}

/// Finds the samples of a cache.
///
/// # Errors
/// [`Error::Data`] if a list or a file is malformed, or a listed file is not below `folder`.
pub fn find(folder: &Path, request: &ImportRequest) -> Result<Vec<Cached>> {
    let mut files = Vec::new();
    find_files(folder, "pt", &mut files)?;
    find_files(folder, "meta", &mut files)?;
    let metadata = folder.join("metadata.json");
    if !metadata.is_file() {
        return in_parallel(&files, request.jobs, |path| sample(path, "", None, request.family));
    }
    let by_name = by_name(&files);
    let Metadata { shards, model_type } = read_json(&metadata)?;
    let mut listed = Vec::new();
    for shard in shards {
        let name = Path::new(&shard).file_name().unwrap_or_default();
        for row in read_json::<Vec<Row>>(&folder.join(name))? {
            listed.push((place(folder, &by_name, &row.cache_file)?, row.prompt));
        }
    }
    in_parallel(&listed, request.jobs, |(path, prompt)| {
        sample(path, prompt, model_type.as_deref(), request.family)
    })
}

fn by_name(files: &[PathBuf]) -> BTreeMap<&std::ffi::OsStr, Vec<&PathBuf>> {
    let mut by_name: BTreeMap<_, Vec<&PathBuf>> = BTreeMap::new();
    for path in files {
        by_name.entry(path.file_name().unwrap_or_default()).or_default().push(path);
    }
    by_name
}

/// Returns the listed file below the folder: the cache may have been moved since, and no path of
/// the list leads elsewhere.
fn place<'f>(
    folder: &Path,
    by_name: &BTreeMap<&std::ffi::OsStr, Vec<&'f PathBuf>>,
    listed: &str,
) -> Result<&'f Path> {
    let listed = Path::new(listed);
    let same = by_name.get(listed.file_name().unwrap_or_default()).map(Vec::as_slice);
    let parent = |path: &Path| path.parent().and_then(Path::file_name).map(ToOwned::to_owned);
    let found = match same.unwrap_or_default() {
        [only] => Some(*only),
        several => several.iter().find(|path| parent(path) == parent(listed)).copied(),
    };
    found.map(PathBuf::as_path).ok_or_else(|| {
        let what = format!("lists {}, which is not below it", listed.display());
        Error::data(folder, what)
    })
}

/// `model_type`: that of the whole cache, if the sample has none of its own.
fn sample(
    path: &Path,
    prompt: &str,
    model_type: Option<&str>,
    wanted: Option<Family>,
) -> Result<Cached> {
    let file = CacheFile::open(path)?;
    if let Some(key) = EDIT_KEYS.iter().find(|key| file.value(key).is_some()) {
        let what = format!(
            "is a sample for editing pictures (`{key}`): no family here trains on ordered context \
             latents; import the cache of a text-to-image or text-to-video preprocessor"
        );
        return Err(Error::data(path, what));
    }
    let family = match file.text("model_type").or(model_type) {
        Some(word) => Some(named_family(word, "its model_type", &FAMILIES, wanted, path)?),
        None => wanted,
    };
    let mut collector = Collector::new();
    for (theirs, ours) in KEYS {
        if file.holds(theirs) {
            // The only family whose texts are stored without padding.
            let unequal = family == Some(Family::QwenImage) && ours == "text_embeddings";
            collector.add(ours, &file, theirs, How { unequal, ..How::default() })?;
        }
    }
    let holds = |key: &str| collector.layout.contains_key(key);
    if !holds("text_embeddings") || holds("image_latents") == holds("video_latents") {
        let what = format!(
            "holds no latents with their text, as NeMo caches text-to-image and text-to-video; it \
             has {}",
            file.names()
        );
        return Err(Error::data(path, what));
    }
    let sources = ["image_path", "video_path", "original_filename"];
    let source = sources.iter().find_map(|key| file.text(key)).unwrap_or_default();
    let caption = file.text("prompt").unwrap_or(prompt);
    let pair = |key| file.value(key).and_then(pair);
    let caption = Caption {
        original_resolution: pair("original_resolution"),
        crop_offset: pair("crop_offset"),
        ..Caption::new(caption, source)
    };
    collector.finish(caption, family)
}

/// Two whole numbers; none if the value is something else.
fn pair(value: &Value) -> Option<[u32; 2]> {
    let number = |value: &Value| match value {
        Value::Int(number) => u32::try_from(*number).ok(),
        _ => None,
    };
    match value.list()? {
        [first, second] => Some([number(first)?, number(second)?]),
        _ => None,
    }
}

/// Reads a list of limited length.
///
/// # Errors
/// [`Error::Data`] if it is too long or malformed.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    // Checked before opening: opening a FIFO would block.
    if !fs::metadata(path).map_err(|error| open_error(path, error))?.is_file() {
        return Err(Error::data(path, "is not a regular file"));
    }
    let file = File::open(path).map_err(|error| open_error(path, error))?;
    let mut text = Vec::new();
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut text).map_err(Error::storage(path, "read"))?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(Error::data(path, format!("is longer than {MAX_JSON_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| Error::data(path, no_json(&text, &error)))
}
