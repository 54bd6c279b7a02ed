//! `fm-dist data import`: the caches of other trainers as datasets. Tensors keep their bits; only
//! where a cache holds latents before normalization, they are scaled.
//!
//! A format is a file here that finds the samples of a folder, and a line of [`CacheFormat`].

mod ai_toolkit;
mod file;
mod musubi;
mod nemo;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::write::{WriteOptions, Written, write_dataset};
use super::{Description, Sample, Samples};
use crate::data::group::{Layout, SampleTensor};
use crate::data::{Caption, DataType, latents_key};
use crate::error::{Error, Result};
use crate::files::safetensors::open_error;
use crate::settings::choice;
use file::CacheFile;

/// Longest caption file that is read.
const MAX_CAPTION_BYTES: u64 = 1 << 16;

choice! {
    /// A trainer whose cache is read.
    pub enum CacheFormat {
        /// NVIDIA NeMo AutoModel.
        "nemo" => Nemo,
        /// musubi-tuner.
        "musubi" => Musubi,
        /// ai-toolkit.
        "ai-toolkit" => AiToolkit,
    }
}

impl CacheFormat {
    fn find(self, folder: &Path) -> Result<Vec<Cached>> {
        match self {
            CacheFormat::Nemo => nemo::find(folder),
            CacheFormat::Musubi => musubi::find(folder),
            CacheFormat::AiToolkit => ai_toolkit::find(folder),
        }
    }
}

/// Options of `fm-dist data import`.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    pub from: CacheFormat,
    pub sources: Vec<PathBuf>,
    pub out: PathBuf,
    /// Folder of `<name of the picture>.txt`, whose texts replace the cache's captions.
    pub captions: Option<PathBuf>,
    pub shard_bytes: u64,
    pub jobs: usize,
    /// That of the first source if unset.
    pub name: Option<String>,
    pub source: Option<String>,
    pub licence: Option<String>,
}

/// Writes the samples of caches as a dataset.
///
/// # Errors
/// [`Error::Data`] naming a file that is malformed, missing or of a model that is not trained here;
/// errors of [`write_dataset`].
pub fn import(request: &ImportRequest) -> Result<Written> {
    let mut cached = Vec::new();
    for source in &request.sources {
        let found = request.from.find(source)?;
        if found.is_empty() {
            return Err(Error::data(source, "holds no sample of this cache's format"));
        }
        cached.extend(found);
    }
    let Some(first) = cached.first() else {
        return Err(Error::config("SRC", "names no folder of a cache"));
    };
    let data_type = first.data_type();
    if let Some(other) = cached.iter().find(|sample| sample.data_type() != data_type) {
        let what = "is of another type than the first sample; import images and videos apart";
        return Err(Error::data(&other.parts[0].file, what));
    }
    if let Some(folder) = &request.captions {
        cached.iter_mut().try_for_each(|sample| sample.take_caption(folder))?;
    }
    let first = request.sources[0].canonicalize().unwrap_or_else(|_| request.sources[0].clone());
    let name = first.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let unknown = || "unknown".to_string();
    let description = Description {
        name: request.name.clone().unwrap_or(name),
        source: request.source.clone().unwrap_or_else(unknown),
        licence: request.licence.clone().unwrap_or_else(unknown),
        data_type,
    };
    let options = WriteOptions {
        out: request.out.clone(),
        shard_bytes: request.shard_bytes,
        jobs: request.jobs,
        order: None,
        further: Vec::new(),
    };
    let (list, parts) = cached.into_iter().map(|cached| (cached.sample, cached.parts)).unzip();
    write_dataset(&Cache { list, parts }, &description, &options)
}

/// One sample of a cache, and where its tensors are.
struct Cached {
    sample: Sample,
    parts: Vec<Part>,
}

/// One tensor of a sample.
struct Part {
    key: &'static str,
    file: PathBuf,
    /// Its name in the file.
    name: String,
    /// Its shape without the axes of length 1 that the cache adds.
    shape: Vec<i64>,
    /// Number of its first rows that are taken over; all if unset.
    tokens: Option<i64>,
    /// Factor that normalizes it, if it is not normalized.
    scale: Option<f64>,
}

impl Cached {
    fn data_type(&self) -> DataType {
        let is_image = self.sample.layout.contains_key(latents_key(DataType::Image));
        if is_image { DataType::Image } else { DataType::Video }
    }

    /// Replaces the caption by the text beside the source's name in `folder`.
    fn take_caption(&mut self, folder: &Path) -> Result<()> {
        let stem = Path::new(&self.sample.caption.source).file_stem().unwrap_or_default();
        let mut path = folder.join(stem).into_os_string();
        path.push(".txt");
        self.sample.caption.caption = read_caption(Path::new(&path))?;
        Ok(())
    }
}

/// The samples of caches.
struct Cache {
    list: Vec<Sample>,
    parts: Vec<Vec<Part>>,
}

impl Samples for Cache {
    fn list(&self) -> &[Sample] {
        &self.list
    }

    fn read(&self, index: usize) -> Result<BTreeMap<String, Tensor>> {
        let (mut tensors, mut opened) = (BTreeMap::new(), None::<CacheFile>);
        for part in &self.parts[index] {
            let file = match opened.take().filter(|file| file.path() == part.file) {
                Some(file) => file,
                None => CacheFile::open(&part.file)?,
            };
            let tensor = file.read(&part.name)?;
            opened = Some(file);
            if tensor.numel() as i64 != part.shape.iter().product::<i64>() {
                return Err(Error::data(&part.file, "was changed while it was read"));
            }
            let tensor = scaled(tensor, part.scale).view(part.shape.as_slice());
            let tensor = match part.tokens {
                Some(tokens) => tensor.narrow(0, 0, tokens).contiguous(),
                None => tensor,
            };
            tensors.insert(part.key.into(), tensor);
        }
        Ok(tensors)
    }
}

/// Multiplies in float32 and rounds once to the tensor's kind.
fn scaled(tensor: Tensor, scale: Option<f64>) -> Tensor {
    let Some(scale) = scale else { return tensor };
    (tensor.to_kind(Kind::Float) * scale).to_kind(tensor.kind())
}

/// Collects one sample's parts.
struct Collector {
    layout: Layout,
    parts: Vec<Part>,
}

impl Collector {
    fn new() -> Self {
        Collector { layout: Layout::new(), parts: Vec::new() }
    }

    /// Adds a tensor of a file under the key of batches.
    ///
    /// # Errors
    /// [`Error::Data`] if the tensor does not have the key's axes.
    fn add(&mut self, key: &'static str, file: &CacheFile, name: &str, how: How) -> Result<()> {
        let (kind, shape) = file.describe(name)?;
        let axes = axes_of(key);
        let mut fitted = shape.clone();
        while fitted.len() > axes
            && let Some(place) = fitted.iter().position(|axis| *axis == 1)
        {
            fitted.remove(place);
        }
        if fitted.len() != axes || fitted.iter().skip(1).any(|axis| *axis < 1) {
            let what = format!("`{name}` has shape {shape:?}; expected {axes} axes for `{key}`");
            return Err(Error::data(file.path(), what));
        }
        let mut taken = fitted.clone();
        if let Some(tokens) = how.tokens {
            if tokens > taken[0] {
                let what = format!("`{name}` has shape {shape:?}, and its mask {tokens} tokens");
                return Err(Error::data(file.path(), what));
            }
            taken[0] = tokens;
        }
        let tensor = SampleTensor { kind, shape: taken, unequal: how.unequal };
        self.layout.insert(key.into(), tensor);
        let (file, name) = (file.path().into(), name.into());
        let How { tokens, scale, .. } = how;
        self.parts.push(Part { key, file, name, shape: fitted, tokens, scale });
        Ok(())
    }

    fn finish(self, caption: Caption) -> Result<Cached> {
        let mut origin = String::new();
        for part in &self.parts {
            let found = fs::metadata(&part.file).map_err(Error::storage(&part.file, "inspect"))?;
            let (bytes, time) = (found.len(), (found.mtime(), found.mtime_nsec()));
            origin += &format!(
                "{} {bytes} {time:?} {} {:?}; ",
                part.file.display(),
                part.name,
                part.scale
            );
        }
        Ok(Cached { sample: Sample { layout: self.layout, caption, origin }, parts: self.parts })
    }
}

/// Options of taking over a tensor.
#[derive(Clone, Copy, Default)]
struct How {
    /// True for a text without padding.
    unequal: bool,
    /// Number of tokens of a text before its padding.
    tokens: Option<i64>,
    scale: Option<f64>,
}

/// Returns the text of a caption file.
fn read_caption(path: &Path) -> Result<String> {
    let found = fs::metadata(path).map_err(|error| open_error(path, error))?;
    if !found.is_file() || found.len() > MAX_CAPTION_BYTES {
        let what = format!("is no file of at most {MAX_CAPTION_BYTES} bytes, as captions are");
        return Err(Error::data(path, what));
    }
    let bytes = fs::read(path).map_err(Error::storage(path, "read"))?;
    let text = String::from_utf8(bytes);
    text.map(|text| text.trim().into()).map_err(|_| Error::data(path, "is no text in UTF-8"))
}

/// Returns the number of axes of one sample's tensor.
fn axes_of(key: &str) -> usize {
    match key {
        "video_latents" | "condition_latents" => 4,
        "image_latents" => 3,
        "text_mask" | "text_mask_2" | "pooled_prompt_embeds" => 1,
        _ => 2,
    }
}
