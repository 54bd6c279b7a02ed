//! Writing a checkpoint, by the protocol in the room's head.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use tch::Tensor;

use super::{MANIFEST, Manifest, Part, folder_name};
use crate::collective::Collective;
use crate::data::safetensors;
use crate::data::sha256::HashingWriter;
use crate::error::{Error, Result};
use crate::nn::ParamSet;
use crate::optim::Optimizer;
use crate::parallel::Replica;
use crate::train::agreement::{agree, on_rank_zero};
use crate::train::run_folder::RunFolder;

/// Parameters of about this many bytes go into one part, so that ranks can write side by side.
const PART_BYTES: i64 = 1 << 30;

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
