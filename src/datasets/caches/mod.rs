//! `fm-dist data import`: the caches of other trainers as datasets. Tensors keep their bits; only
//! where a cache holds latents before normalization, they are scaled.
//!
//! A format is a file here that finds the samples of a folder, and a line of [`CacheFormat`].
//!
//! | question | file |
//! |---|---|
//! | tensors of a file by name | `file.rs` |
//! | a sample, and what becomes of its tensors | `sample.rs` |
//! | which family a cache is of, and what that family trains on | `family.rs` |
//! | NeMo AutoModel | `nemo.rs` |
//! | musubi-tuner | `musubi.rs` |
//! | diffusion-pipe | `diffusion_pipe/` |
//! | SimpleTuner | `simpletuner.rs` |
//! | ai-toolkit | `ai_toolkit.rs` |

mod ai_toolkit;
mod diffusion_pipe;
mod family;
mod file;
mod musubi;
mod nemo;
mod sample;
mod simpletuner;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::write::{WriteOptions, Written, write_dataset};
use super::{About, Description};
use crate::collective::Collective;
use crate::collective::agreement::agreed;
use crate::encoding::Family;
use crate::error::{Error, Result};
use crate::files::safetensors::open_error;
use crate::settings::choice;
use family::{agreed_family, check_normalized};
use sample::{Cache, Cached};

/// Longest caption file that is read.
const MAX_CAPTION_BYTES: u64 = 1 << 16;

choice! {
    /// A trainer whose cache is read.
    pub enum CacheFormat {
        /// NVIDIA NeMo AutoModel.
        "nemo" => Nemo,
        /// musubi-tuner.
        "musubi" => Musubi,
        /// diffusion-pipe.
        "diffusion-pipe" => DiffusionPipe,
        /// SimpleTuner.
        "simpletuner" => SimpleTuner,
        /// ai-toolkit.
        "ai-toolkit" => AiToolkit,
    }
}

impl CacheFormat {
    fn find(self, request: &ImportRequest) -> Result<Vec<Cached>> {
        let find = match self {
            CacheFormat::Nemo => nemo::find,
            CacheFormat::Musubi => musubi::find,
            CacheFormat::DiffusionPipe => diffusion_pipe::find,
            CacheFormat::AiToolkit => ai_toolkit::find,
            // Its latents, texts and pictures lie in folders of their own.
            CacheFormat::SimpleTuner => return simpletuner::find(request),
        };
        let mut cached = Vec::new();
        for source in &request.sources {
            let found = find(source, request)?;
            if found.is_empty() {
                return Err(Error::data(source, "holds no sample of this cache's format"));
            }
            cached.extend(found);
        }
        if let Some(folder) = &request.captions {
            cached.iter_mut().try_for_each(|sample| sample.take_caption(folder))?;
        }
        Ok(cached)
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
    /// The family that the samples must be of; that of the cache if unset.
    pub family: Option<Family>,
    pub shard_bytes: u64,
    pub jobs: usize,
    pub about: About,
}

/// A dataset that was made from caches.
#[derive(Clone, Debug)]
pub struct Imported {
    pub written: Written,
    /// Lines on what was done with the cache's numbers.
    pub notes: Vec<&'static str>,
}

/// Writes the samples of caches as a dataset. Each rank writes its part of the files.
///
/// # Errors
/// [`Error::Data`] naming a file that is malformed, missing or of a model that is not trained here;
/// errors of [`write_dataset`].
///
/// # Ordering
/// Every rank calls it.
pub fn import(request: &ImportRequest, collective: &dyn Collective) -> Result<Imported> {
    let (cache, description, notes) = agreed(prepared(request), collective)?;
    let options = WriteOptions {
        out: request.out.clone(),
        shard_bytes: request.shard_bytes,
        jobs: request.jobs,
        order: None,
        further: Vec::new(),
    };
    let written = write_dataset(&cache, &description, &options, collective)?;
    Ok(Imported { written, notes })
}

/// Finds all samples and checks that they can be trained on together.
fn prepared(request: &ImportRequest) -> Result<(Cache, Description, Vec<&'static str>)> {
    if request.family == Some(Family::Dit) {
        return Err(Error::config("--family", "is dit, of which no trainer has caches"));
    }
    let Some(first_source) = request.sources.first() else {
        return Err(Error::config("SRC", "names no folder of a cache"));
    };
    let cached = request.from.find(request)?;
    let first = cached
        .first()
        .ok_or_else(|| Error::data(first_source, "holds no sample of this cache's format"))?;
    let data_type = first.data_type();
    if let Some(other) = cached.iter().find(|sample| sample.data_type() != data_type) {
        let what = "is of another type than the first sample; import images and videos apart";
        return Err(Error::data(other.path(), what));
    }
    let family = agreed_family(&cached, request.family)?;
    let notes: BTreeSet<&str> = cached.iter().filter_map(|sample| sample.note).collect();
    let description = request.about.describe(first_source, data_type);
    let cache = Cache::new(cached);
    if family == Some(Family::Flux2) {
        check_normalized(&cache, first_source)?;
    }
    Ok((cache, description, notes.into_iter().collect()))
}

/// Returns the text of a caption file.
fn read_caption(path: &Path) -> Result<String> {
    let found = fs::metadata(path).map_err(|error| open_error(path, error))?;
    if !found.is_file() || found.len() > MAX_CAPTION_BYTES {
        let what = format!("is no file of at most {MAX_CAPTION_BYTES} bytes, as captions are");
        return Err(Error::data(path, what));
    }
    let bytes = fs::read(path).map_err(Error::storage(path, "read"))?;
    String::from_utf8(bytes).map_err(|_| Error::data(path, "is no text in UTF-8"))
}
