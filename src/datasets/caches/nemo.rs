//! The cache of NVIDIA NeMo AutoModel: one file of `torch.save` for each sample, listed in
//! `metadata.json` and its shards, or a flat folder of such files.
//!
//! Source: NeMo AutoModel 0.7.0, `tools/diffusion` and `components/datasets/diffusion`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::file::CacheFile;
use super::{Cached, Collector, How};
use crate::data::Caption;
use crate::datasets::index::find as find_files;
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
/// Begin of the `model_type` of Qwen-Image, the only family whose texts are stored without padding.
const UNPADDED: &str = "qwen";

#[derive(Deserialize)]
struct Metadata {
    shards: Vec<String>,
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
pub fn find(folder: &Path) -> Result<Vec<Cached>> {
    let mut files = Vec::new();
    find_files(folder, "pt", &mut files)?;
    find_files(folder, "meta", &mut files)?;
    let metadata = folder.join("metadata.json");
    if !metadata.is_file() {
        return files.iter().map(|path| sample(path, "")).collect();
    }
    let by_name = by_name(&files);
    let mut found = Vec::new();
    for shard in read_json::<Metadata>(&metadata)?.shards {
        let name = Path::new(&shard).file_name().unwrap_or_default();
        for row in read_json::<Vec<Row>>(&folder.join(name))? {
            found.push(sample(place(folder, &by_name, &row.cache_file)?, &row.prompt)?);
        }
    }
    Ok(found)
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

fn sample(path: &Path, prompt: &str) -> Result<Cached> {
    let file = CacheFile::open(path)?;
    let CacheFile::Pickled(pickled) = &file else {
        return Err(Error::data(path, "is no file of torch.save"));
    };
    let root = pickled.root();
    let mut collector = Collector::new();
    let text = |key: &str| root.get(key).and_then(Value::text);
    let unpadded = text("model_type").is_some_and(|family| family.starts_with(UNPADDED));
    for (theirs, ours) in KEYS {
        if root.get(theirs).and_then(Value::tensor).is_some() {
            let unequal = unpadded && ours == "text_embeddings";
            collector.add(ours, &file, theirs, How { unequal, ..How::default() })?;
        }
    }
    let holds = |key: &str| collector.layout.contains_key(key);
    if !holds("text_embeddings") || holds("image_latents") == holds("video_latents") {
        let keys: Vec<&str> = root.entries().into_iter().flatten().map(|(key, _)| &**key).collect();
        let what = format!(
            "holds no latents with their text, as NeMo caches text-to-image and text-to-video; it \
             has {}",
            keys.join(", ")
        );
        return Err(Error::data(path, what));
    }
    let source = text("image_path").or(text("video_path")).unwrap_or_default().to_string();
    collector.finish(Caption { caption: text("prompt").unwrap_or(prompt).into(), source })
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let file = File::open(path).map_err(|error| open_error(path, error))?;
    if !file.metadata().map_err(Error::storage(path, "inspect"))?.is_file() {
        return Err(Error::data(path, "is not a regular file"));
    }
    let mut text = Vec::new();
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut text).map_err(Error::storage(path, "read"))?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(Error::data(path, format!("is longer than {MAX_JSON_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| Error::data(path, no_json(&text, &error)))
}
