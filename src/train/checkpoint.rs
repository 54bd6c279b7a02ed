//! Checkpoints: parts that every rank writes, a manifest that makes them one, and a rename that makes them real.
//!
//! A checkpoint is valid if its manifest parses and every part has the size and hash it says. Parts hold parameters by
//! name, not ranks, so that any world size loads what any other saved, and equal state gives equal bytes: nothing in a
//! checkpoint tells the time, the machine or the number of ranks.
//!
//! Order of a save: parts written, synced and hashed under a temporary name; all ranks agree; manifest, synced; folder,
//! synced; renamed; parent, synced. A crash or a power cut before the rename leaves the checkpoint before.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use super::agreement::{agree, on_rank_zero};
use super::run_folder::RunFolder;
use crate::collective::Collective;
use crate::data::safetensors::{self, SafeTensors};
use crate::data::sha256::HashingWriter;
use crate::error::{Error, Result};
use crate::nn::ParamSet;
use crate::optim::Optimizer;
use crate::parallel::Replica;

const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "fm-dist checkpoint";
const VERSION: u64 = 1;

/// Parameters of about this many bytes go into one part, so that ranks can write side by side.
const PART_BYTES: i64 = 1 << 30;

/// Missing or unexpected names that a message lists before it only counts.
const LISTED_NAMES: usize = 20;

/// What a checkpoint says of the run, besides tensors: all that a resume needs.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u64,
    /// Optimizer steps done.
    pub step: u64,
    pub samples_seen: u64,
    pub seed: u64,
    pub global_batch_size: u64,
    /// Of the dataset, see [`Dataset::fingerprint`](crate::data::Dataset::fingerprint).
    pub data: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
struct Part {
    file: String,
    bytes: u64,
    sha256: String,
}

impl Manifest {
    /// Of a run that has not begun.
    pub fn new(seed: u64, global_batch_size: u64, data: String) -> Self {
        Manifest { format: FORMAT.into(), version: VERSION, step: 0, samples_seen: 0, seed, global_batch_size, data, parts: Vec::new() }
    }

    /// Refuses to go on where the same step would see other samples or other draws.
    fn check_same_run(&self, path: &Path, configured: &Manifest) -> Result<()> {
        let pairs = [
            ("seed", self.seed.to_string(), configured.seed.to_string()),
            ("global batch", self.global_batch_size.to_string(), configured.global_batch_size.to_string()),
            ("data fingerprint", self.data.clone(), configured.data.clone()),
        ];
        let differing = pairs.iter().filter(|(_, saved, now)| saved != now);
        let texts: Vec<String> = differing.map(|(name, saved, now)| format!("{name} is {now}, the checkpoint's was {saved}")).collect();
        if texts.is_empty() { Ok(()) } else { Err(Error::checkpoint_mismatch(path, texts.join("; "))) }
    }
}

/// `step-00000200`.
pub fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Whether a folder claims to be a checkpoint.
pub fn is_checkpoint(folder: &Path) -> bool {
    folder.join(MANIFEST).exists()
}

/// Committed checkpoints of a run by step, ascending; whether they verify is another question.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = fs::read_dir(run).map_err(Error::storage(run, "list"))?;
    let step_of = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let mut found: Vec<_> = entries.flatten().filter_map(|entry| Some((step_of(&entry.path())?, entry.path()))).collect();
    found.sort();
    Ok(found)
}

/// Reads the manifest and compares every part's size and hash with it.
///
/// # Errors
/// [`Error::CheckpointMismatch`] naming the first file at fault.
pub fn verify(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let broken = |what: String| Error::checkpoint_mismatch(&path, what);
    let text = fs::read_to_string(&path).map_err(|error| broken(format!("cannot be read: {error}")))?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|error| broken(format!("is no manifest: {error}")))?;
    if manifest.format != FORMAT || manifest.version != VERSION {
        return Err(broken(format!(
            "is {:?} version {}, this program reads {FORMAT:?} version {VERSION}",
            manifest.format, manifest.version
        )));
    }
    for part in &manifest.parts {
        verify_part(folder, part)?;
    }
    Ok(manifest)
}

fn verify_part(folder: &Path, part: &Part) -> Result<()> {
    let path = folder.join(&part.file);
    let broken = |what: String| Error::checkpoint_mismatch(&path, what);
    if Path::new(&part.file).components().count() != 1 {
        return Err(broken("leaves the checkpoint's folder".into()));
    }
    let bytes = fs::metadata(&path).map_err(|error| broken(format!("cannot be read: {error}")))?.len();
    if bytes != part.bytes {
        return Err(broken(format!("has {bytes} bytes, the manifest says {}", part.bytes)));
    }
    let mut hashing = HashingWriter::new(io::sink());
    let hashed = File::open(&path).and_then(|mut file| io::copy(&mut file, &mut hashing));
    let (_, sha256, _) = hashed.map(|_| hashing.finish()).map_err(|error| broken(format!("cannot be read: {error}")))?;
    if sha256 != part.sha256 {
        return Err(broken(format!("has sha256 {sha256}, the manifest says {}", part.sha256)));
    }
    Ok(())
}

/// Saves the run's state; returns the committed folder on every rank, or no rank has it.
///
/// # Errors
/// [`Error::Storage`] on a rank that could not write, [`Error::Peer`] on the others; the checkpoint before stays.
pub fn save(
    run: &RunFolder,
    manifest: &Manifest,
    replica: &Replica,
    optimizer: &dyn Optimizer,
    state: &[Vec<Tensor>],
    collective: &dyn Collective,
) -> Result<PathBuf> {
    let target = run.checkpoint(manifest.step);
    let staged = run.path().join(format!(".{}.tmp", folder_name(manifest.step)));
    on_rank_zero(collective, || prepare(&staged, &target).map(|()| String::new()))?;
    let mine = |index: usize| index % collective.world_size() == collective.rank();
    let written = write_parts(&staged, replica, optimizer, state, mine);
    let texts = agree(written.map(|parts| serde_json::to_string(&parts).expect("parts are JSON")), collective)?;
    on_rank_zero(collective, || commit(&staged, &target, manifest, &texts).map(|()| String::new()))?;
    Ok(target)
}

/// A fresh folder for the parts, without what a crash left there.
fn prepare(staged: &Path, target: &Path) -> Result<()> {
    if target.exists() {
        let exists = io::Error::new(io::ErrorKind::AlreadyExists, "a committed checkpoint is never written over");
        return Err(Error::Storage { path: target.into(), operation: "create", source: exists });
    }
    if staged.exists() {
        fs::remove_dir_all(staged).map_err(Error::storage(staged, "clear"))?;
    }
    fs::create_dir(staged).map_err(Error::storage(staged, "create"))
}

fn write_parts(
    staged: &Path,
    replica: &Replica,
    optimizer: &dyn Optimizer,
    state: &[Vec<Tensor>],
    mine: impl Fn(usize) -> bool,
) -> Result<Vec<Part>> {
    let ranges = part_ranges(replica);
    let count = ranges.len();
    let mut parts = Vec::new();
    for (index, range) in ranges.into_iter().enumerate().filter(|(index, _)| mine(*index)) {
        let model = range.clone().flat_map(|stage| named("", replica.stages[stage].params(), replica.buckets[stage].master()));
        parts.push(write_part(staged, &part_name("model", index, count), model.collect())?);
        let moments = range.flat_map(|stage| {
            let params = replica.stages[stage].params();
            optimizer.state_names().iter().zip(&state[stage]).flat_map(move |(name, flat)| named(&format!("{name}."), params, flat))
        });
        parts.push(write_part(staged, &part_name("optimizer", index, count), moments.collect())?);
    }
    Ok(parts)
}

/// `model-00001-of-00002.safetensors`.
fn part_name(kind: &str, index: usize, count: usize) -> String {
    format!("{kind}-{:05}-of-{count:05}.safetensors", index + 1)
}

/// Consecutive stages that share a part; depends on the model alone.
fn part_ranges(replica: &Replica) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (stage, params) in replica.stages.iter().map(|stage| stage.params()).enumerate() {
        bytes += 4 * params.numel();
        match ranges.last_mut() {
            Some(range) if bytes <= PART_BYTES => range.end = stage + 1,
            _ => {
                bytes = 4 * params.numel();
                ranges.push(stage..stage + 1);
            }
        }
    }
    ranges
}

/// A flat buffer's parameters as named views.
fn named(prefix: &str, params: &ParamSet, flat: &Tensor) -> Vec<(String, Tensor)> {
    let views = params.split(flat);
    params.infos().iter().zip(views.iter()).map(|(info, view)| (format!("{prefix}{}", info.name), view.shallow_clone())).collect()
}

fn write_part(staged: &Path, name: &str, tensors: Vec<(String, Tensor)>) -> Result<Part> {
    let path = staged.join(name);
    let file = File::create_new(&path).map_err(Error::storage(&path, "create"))?;
    let mut writer = HashingWriter::new(BufWriter::new(file));
    let borrowed: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    safetensors::write(&mut writer, &borrowed, &BTreeMap::new()).map_err(Error::storage(&path, "write"))?;
    let (buffered, sha256, bytes) = writer.finish();
    let synced = buffered.into_inner().map_err(|error| error.into_error()).and_then(|file| file.sync_all());
    synced.map_err(Error::storage(&path, "write"))?;
    Ok(Part { file: name.into(), bytes, sha256 })
}

/// `texts`: each rank's parts.
fn commit(staged: &Path, target: &Path, manifest: &Manifest, texts: &[String]) -> Result<()> {
    let of_rank = |text: &String| serde_json::from_str::<Vec<Part>>(text).expect("ranks send what they wrote");
    let mut manifest = Manifest { parts: texts.iter().flat_map(of_rank).collect(), ..manifest.clone() };
    manifest.parts.sort_by(|a, b| a.file.cmp(&b.file));
    let path = staged.join(MANIFEST);
    let text = serde_json::to_string_pretty(&manifest).expect("a manifest is JSON") + "\n";
    let written = File::create_new(&path).and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(Error::storage(&path, "write"))?;
    sync_folder(staged)?;
    fs::rename(staged, target).map_err(Error::storage(target, "rename to"))?;
    sync_folder(target.parent().unwrap_or(Path::new(".")))
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::storage(folder, "sync"))
}

/// Loads a verified checkpoint into a model of the same parameters; nothing is changed before all of it was read.
///
/// # Errors
/// [`Error::CheckpointMismatch`] if it belongs to another run or model, listing every key at fault.
pub fn load(
    folder: &Path,
    configured: &Manifest,
    replica: &mut Replica,
    optimizer: &dyn Optimizer,
    state: &mut [Vec<Tensor>],
) -> Result<Manifest> {
    let manifest = read_manifest(folder)?;
    manifest.check_same_run(folder, configured)?;
    let files = PartFiles::open(folder, &manifest, "")?;
    let prefixes: Vec<String> = optimizer.state_names().iter().map(|name| format!("{name}.")).collect();
    files.check_keys(replica, &prefixes)?;
    let read = |prefix: &str| replica.stages.iter().map(|stage| files.flat(prefix, stage.params())).collect::<Result<Vec<_>>>();
    let masters = read("")?;
    let moments = prefixes.iter().map(|prefix| read(prefix)).collect::<Result<Vec<_>>>()?;
    adopt(replica, &masters);
    no_grad(|| {
        for (kind, flats) in moments.iter().enumerate() {
            state.iter_mut().zip(flats).for_each(|(tensors, flat)| tensors[kind].copy_(flat));
        }
    });
    Ok(Manifest { parts: Vec::new(), ..manifest })
}

/// Loads the parameters alone.
///
/// # Errors
/// As [`load`].
pub fn load_parameters(folder: &Path, replica: &mut Replica) -> Result<Manifest> {
    let manifest = read_manifest(folder)?;
    let files = PartFiles::open(folder, &manifest, "model-")?;
    files.check_keys(replica, &[])?;
    let masters = replica.stages.iter().map(|stage| files.flat("", stage.params())).collect::<Result<Vec<_>>>()?;
    adopt(replica, &masters);
    Ok(manifest)
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let text = fs::read_to_string(&path).map_err(Error::storage(&path, "read"))?;
    serde_json::from_str(&text).map_err(|error| Error::checkpoint_mismatch(&path, format!("is no manifest: {error}")))
}

fn adopt(replica: &mut Replica, masters: &[Tensor]) {
    for (bucket, flat) in replica.buckets.iter_mut().zip(masters) {
        bucket.update(|master| master.copy_(flat));
    }
}

/// The opened parts of a checkpoint.
struct PartFiles<'f> {
    folder: &'f Path,
    files: Vec<SafeTensors>,
}

impl<'f> PartFiles<'f> {
    /// Those whose names begin with `kind`.
    fn open(folder: &'f Path, manifest: &Manifest, kind: &str) -> Result<Self> {
        let wanted = manifest.parts.iter().filter(|part| part.file.starts_with(kind));
        let files = wanted.map(|part| SafeTensors::open(folder.join(&part.file))).collect::<Result<Vec<_>>>();
        let as_mismatch = |error: Error| Error::checkpoint_mismatch(folder, error.to_string());
        Ok(PartFiles { folder, files: files.map_err(as_mismatch)? })
    }

    /// Compares names, shapes and kinds with what the model and each optimizer tensor expect.
    fn check_keys(&self, replica: &Replica, prefixes: &[String]) -> Result<()> {
        let mut expected = BTreeMap::new();
        for prefix in std::iter::once("").chain(prefixes.iter().map(String::as_str)) {
            expected.extend(replica.infos().map(|info| (format!("{prefix}{}", info.name), &info.shape)));
        }
        let found: BTreeMap<&str, _> = self.files.iter().flat_map(|file| file.tensors()).map(|info| (info.name.as_str(), info)).collect();
        let missing = expected.keys().filter(|name| !found.contains_key(name.as_str())).cloned().collect();
        let known: BTreeSet<&str> = expected.keys().map(String::as_str).collect();
        let unexpected = found.keys().filter(|name| !known.contains(*name)).map(ToString::to_string).collect();
        let unfit = found.values().filter_map(|info| {
            let shape = *expected.get(&info.name)?;
            let fits = info.kind == Kind::Float && info.shape == *shape;
            (!fits).then(|| format!("{} is {:?} {:?} instead of Float {shape:?}", info.name, info.kind, info.shape))
        });
        let texts = [("missing", missing), ("unexpected", unexpected), ("of another shape or kind", unfit.collect())];
        let texts: Vec<String> = texts.into_iter().filter_map(|(what, names)| listed(what, names)).collect();
        if texts.is_empty() { Ok(()) } else { Err(Error::checkpoint_mismatch(self.folder, texts.join("; "))) }
    }

    /// One stage's parameters as the flat buffer that holds them.
    fn flat(&self, prefix: &str, params: &ParamSet) -> Result<Tensor> {
        let read = |name: String| {
            let holds = |file: &&SafeTensors| file.tensors().iter().any(|info| info.name == name);
            self.files.iter().find(holds).expect("all keys were checked").read(&name)
        };
        let pieces = params.infos().iter().map(|info| Ok(read(format!("{prefix}{}", info.name))?.flatten(0, -1)));
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        Ok(if pieces.is_empty() { Tensor::zeros([0], (Kind::Float, tch::Device::Cpu)) } else { Tensor::cat(&pieces, 0) })
    }
}

fn listed(what: &str, names: Vec<String>) -> Option<String> {
    let more = names.len().saturating_sub(LISTED_NAMES);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty()).then(|| format!("{what}: {}{tail}", names[..names.len() - more].join(", ")))
}
