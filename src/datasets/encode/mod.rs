//! `fm-dist data encode`: pictures or videos with captions as a dataset, by the published encoders
//! of a family.
//!
//! Equal captions are encoded once, and so are equal pictures in equal buckets, by the hash of
//! their content. The batches follow from the plan alone; each is a file of its own until the
//! dataset is written, so that a run that was killed goes on with the batches that are missing, on
//! any number of ranks, and gives the same bytes. Prompts come first and pixels after them: one
//! encoder is in memory at a time.
//!
//! | question | file |
//! |---|---|
//! | what is found, and which of it is sound | `sources.rs` |
//! | which rows are encoded together | `batches.rs` |
//! | the work of all ranks | `work.rs` |
//! | encoded rows until the dataset is written | `store.rs` |
//! | from pixels to rows | `pixels.rs` |
//! | the samples of the dataset | `samples.rs` |

mod batches;
mod pixels;
mod samples;
mod sources;
mod store;
mod work;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::json;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::About;
use super::pictures::{Found, PictureOptions, Pixels};
use super::write::{FurtherFile, WriteOptions, Written, write_dataset};
use crate::collective::Collective;
use crate::collective::agreement::{agreed, on_rank_zero};
use crate::data::DataType;
use crate::encoding::{Conditions, Family, Pipeline, stacked};
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::files::safetensors::write;
use crate::files::sha256;
use crate::libtorch;
use crate::settings::Choice;
use batches::{Batch, Batches};
use pixels::encode_pixels;
use samples::{Encoded, Medium, Text};
use sources::Sources;
use store::{Store, check_free};
use work::encode_missing;

/// Captions that the dataset holds as named conditions, to sample from.
const NAMED: usize = 4;

const NOT_FINITE: &str = "became numbers that are not finite; try --dtype float32";

/// Options of `fm-dist data encode`.
#[derive(Clone, Debug)]
pub struct EncodeRequest {
    pub family: Family,
    /// Folder of the published pipeline.
    pub pipeline: Option<PathBuf>,
    pub device: Device,
    /// Kind in which networks compute, and in which conditions are stored; latents are stored in
    /// float16 where it is bfloat16, as by the reference.
    pub kind: Kind,
    pub pictures: PictureOptions,
    pub out: PathBuf,
    /// Most tokens of a batch: rows of text, or squares of 16 x 16 pixels.
    pub batch_tokens: u64,
    pub shard_bytes: u64,
    pub jobs: usize,
    pub about: About,
}

/// A dataset that was made of pictures or videos.
#[derive(Clone, Debug)]
pub struct EncodedDataset {
    pub written: Written,
    /// Lines for the user: buckets, and files that were skipped or lack something, these last.
    pub notes: Vec<String>,
}

/// Encodes a folder of pictures or videos. Each rank encodes its part of the batches and writes its
/// part of the files.
///
/// # Errors
/// [`Error::Data`] if `out` is a dataset already, or naming what is missing of the pipeline, what
/// its parts do not fit, or a file that cannot be used; [`Error::Config`] for options that fit no
/// bucket; errors of [`write_dataset`]. An error of a file is met by one rank alone, and ends the
/// world.
///
/// # Ordering
/// Every rank calls it.
pub fn encode(request: &EncodeRequest, collective: &dyn Collective) -> Result<EncodedDataset> {
    agreed(check_free(&request.out), collective)?;
    let opened = Pipeline::open(request.family, request.pipeline.as_deref());
    let pipeline = agreed(opened, collective)?.on(request.device, request.kind);
    let mut pictures = request.pictures.clone();
    if let (Some(frames), Some(time)) = (&mut pictures.frames, pipeline.factors().time) {
        frames.step = time as usize;
    }
    let sources = Sources::find(&pictures, &pipeline, collective)?;
    let plan = Plan::new(request, &pipeline, &sources);
    let fingerprint = agreed(plan.fingerprint(request), collective)?;
    let store = Store::open(&request.out, &fingerprint, collective)?;
    plan.encode_texts(request, &pipeline, &store, collective)?;
    pipeline.unload();
    plan.encode_media(request, &pipeline, &store, &sources.found, collective)?;
    pipeline.unload();
    let Plan { texts, of_texts, media, of_media } = &plan;
    let (texts, media) = ((texts.as_slice(), of_texts), (media.as_slice(), of_media));
    let encoded = Encoded::new(&store, &fingerprint, texts, media, sources.pairs.clone());
    let further = further_files(&plan, &pipeline, &store, &encoded, collective)?;
    let options = WriteOptions {
        out: request.out.clone(),
        shard_bytes: request.shard_bytes,
        jobs: request.jobs,
        order: None,
        further,
    };
    let description = request.about.describe(&request.pictures.folder, request.family.data_type);
    let written = write_dataset(&encoded, &description, &options, collective)?;
    on_rank_zero(collective, move || store.delete().map(|()| String::new()))?;
    Ok(EncodedDataset { written, notes: sources.found.notes() })
}

/// All that is encoded, in its batches.
struct Plan {
    /// The first one is the empty prompt.
    texts: Vec<Text>,
    of_texts: Batches,
    media: Vec<Medium>,
    of_media: Batches,
}

impl Plan {
    fn new(request: &EncodeRequest, pipeline: &Pipeline, sources: &Sources) -> Self {
        let texts: Vec<Text> = sources.texts.iter().map(|text| Text::new(text, pipeline)).collect();
        let media = sources.media.clone();
        let budget = request.batch_tokens;
        let of_texts =
            Batches::new("texts", texts.len(), budget, |_| (), |row| texts[row].tokens());
        let shape = |row: usize| {
            let Medium { pixels, layout, .. } = &media[row];
            (pixels.clone(), layout.keys().cloned().collect::<Vec<_>>())
        };
        let of_media =
            Batches::new("pixels", media.len(), budget, shape, |row| media[row].tokens());
        Plan { texts, of_texts, media, of_media }
    }

    /// Returns a hash of everything that decides the bytes of the store.
    fn fingerprint(&self, request: &EncodeRequest) -> Result<String> {
        let mut hash = Sha256::new();
        let EncodeRequest { family, kind, device, .. } = request;
        let (is_gpu, threads) = (device.is_cuda(), tch::get_num_threads());
        hash.update(format!("{} {kind:?} {is_gpu} {threads}\n", family.word()));
        let libtorch = libtorch::library().and_then(|library| libtorch::version(&library));
        hash.update(format!("{} {libtorch:?}\n", env!("CARGO_PKG_VERSION")));
        let pipeline = request.pipeline.as_deref().unwrap_or(Path::new(""));
        let optional = family.optional_parts.iter().filter(|part| pipeline.join(part).is_dir());
        for part in family.parts.iter().chain(optional) {
            let folder = pipeline.join(part);
            hash.update(format!("{part} {}\n", names_of(&folder)?));
        }
        for batch in &self.of_texts.list {
            for row in &batch.rows {
                hash.update(format!("{} {row} {:?}\n", batch.file, self.texts[*row]));
            }
        }
        for batch in &self.of_media.list {
            for row in &batch.rows {
                hash.update(format!("{} {row} {:?}\n", batch.file, self.media[*row]));
            }
        }
        Ok(sha256::hex(hash))
    }

    fn encode_texts(
        &self,
        request: &EncodeRequest,
        pipeline: &Pipeline,
        store: &Store,
        collective: &dyn Collective,
    ) -> Result<()> {
        let encode = |batch: &Batch, ()| {
            let texts: Vec<&str> =
                batch.rows.iter().map(|row| self.texts[*row].text.as_str()).collect();
            let rows = pipeline.encode_prompts(&texts)?;
            let wrong = first_not_finite(&rows).map(|(row, key)| {
                let what = format!("`{key}` of the caption {:?} {NOT_FINITE}", texts[row]);
                Error::data(request.pipeline.as_deref().unwrap_or(Path::new("")), what)
            });
            wrong.map_or(Ok(rows), Err)
        };
        let work = ("captions", request.jobs);
        encode_missing(store, &self.of_texts.list, work, |_| Ok(()), encode, collective)
    }

    fn encode_media(
        &self,
        request: &EncodeRequest,
        pipeline: &Pipeline,
        store: &Store,
        found: &Found,
        collective: &dyn Collective,
    ) -> Result<()> {
        let prepare = |batch: &Batch| {
            let read = |row: &usize| found.read(self.media[*row].item);
            batch.rows.iter().map(read).collect::<Result<Vec<_>>>()
        };
        let encode = |batch: &Batch, read: Vec<Pixels>| {
            let media: Vec<&Medium> = batch.rows.iter().map(|row| &self.media[*row]).collect();
            let rows = encode_pixels(pipeline, &media, &read)?;
            let wrong = first_not_finite(&rows).map(|(row, key)| {
                let path = &found.items[media[row].item].medium.path;
                Error::data(path, format!("its `{key}` {NOT_FINITE}"))
            });
            wrong.map_or(Ok(rows), Err)
        };
        let work = (words(request.family), request.jobs);
        encode_missing(store, &self.of_media.list, work, prepare, encode, collective)
    }
}

/// Returns row and key of the first tensor with a number that is not finite.
fn first_not_finite(rows: &[Conditions]) -> Option<(usize, &str)> {
    let tensors = rows.iter().enumerate().flat_map(|(number, row)| {
        row.iter().map(move |(key, tensor)| (number, key.as_str(), tensor))
    });
    let is_finite = |tensor: &Tensor| tensor.isfinite().all().int64_value(&[]) == 1;
    let mut wrong = tensors.filter(|(_, _, tensor)| !is_finite(tensor));
    wrong.next().map(|(number, key, _)| (number, key))
}

/// Returns the word for what a family's encoder is given.
fn words(family: Family) -> &'static str {
    match family.data_type {
        DataType::Image => "pictures",
        DataType::Video => "videos",
    }
}

/// Returns names, sizes and times of the files of a folder and of those below it: as long as they
/// are the same, so are the weights.
fn names_of(folder: &Path) -> Result<String> {
    let mut listed = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::storage(&folder, "list"))? {
            let path = entry.map_err(Error::storage(&folder, "list"))?.path();
            let found = fs::metadata(&path).map_err(Error::storage(&path, "inspect"))?;
            match found.is_dir() {
                true => folders.push(path),
                false => {
                    let time =
                        found.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
                    listed.push(format!("{} {} {time:?}", path.display(), found.len()));
                }
            }
        }
    }
    listed.sort();
    Ok(listed.join("\n"))
}

/// Writes named conditions and the empty prompt into the store, for the dataset to take over.
fn further_files(
    plan: &Plan,
    pipeline: &Pipeline,
    store: &Store,
    encoded: &Encoded<'_>,
    collective: &dyn Collective,
) -> Result<Vec<FurtherFile>> {
    let layout = pipeline.prompt_shapes("");
    let names: Vec<&str> =
        plan.texts.iter().skip(1).take(NAMED).map(|text| text.text.as_str()).collect();
    let [conditions, empty] = ["conditions", "empty_prompt"];
    on_rank_zero(collective, || {
        let rows = |numbers: std::ops::Range<usize>| -> Result<Conditions> {
            let rows = numbers.map(|number| encoded.text(number)).collect::<Result<Vec<_>>>()?;
            Ok(stacked(&rows, &layout))
        };
        write_tensors(&store.path(empty), &only_row(&rows(0..1)?))?;
        if !names.is_empty() {
            write_tensors(&store.path(conditions), &rows(1..1 + names.len())?)?;
        }
        Ok(String::new())
    })?;
    let file = |key, entry| FurtherFile { key, path: store.path(key), entry };
    let mut files = vec![file(empty, json!({}))];
    files.extend((!names.is_empty()).then(|| file(conditions, json!({"names": names}))));
    Ok(files)
}

fn only_row(tensors: &Conditions) -> Conditions {
    tensors.iter().map(|(key, tensor)| (key.clone(), tensor.get(0))).collect()
}

fn write_tensors(path: &Path, tensors: &Conditions) -> Result<()> {
    let tensors: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(key, tensor)| (key.as_str(), tensor)).collect();
    replace_file(path, |mut out| write(&mut out, &tensors, &BTreeMap::new()))
}
