//! Writing a checkpoint, by the protocol in the room's head.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::{MANIFEST, Manifest, Part, folder_name};
use crate::collective::Collective;
use crate::data::safetensors::{self, Planned};
use crate::data::sha256::HashingWriter;
use crate::error::{Error, Result};
use crate::nn::ParamSet;
use crate::optim::Optimizer;
use crate::parallel::Replica;
use crate::train::agreement::{agree, on_rank_zero};
use crate::train::run_folder::RunFolder;
use crate::train::state::OptimizerState;

/// Parameters of about this many bytes go into one part, so that ranks can write side by side.
const PART_BYTES: i64 = 1 << 30;

/// What a checkpoint is made of.
pub struct Saved<'r> {
    pub manifest: &'r Manifest,
    pub replica: &'r Replica<'r>,
    pub optimizer: &'r dyn Optimizer,
    pub state: &'r OptimizerState,
}

/// Saves the run's state; returns the committed folder on every rank, or no rank has it.
///
/// # Errors
/// [`Error::Storage`] on a rank that could not write, [`Error::Peer`] on the others; the checkpoint before stays.
pub fn save(run: &RunFolder, saved: &Saved<'_>, collective: &dyn Collective) -> Result<PathBuf> {
    let step = saved.manifest.step;
    let target = run.checkpoint(step);
    let staged = run.path().join(format!(".{}.tmp", folder_name(step)));
    on_rank_zero(collective, || prepare(&staged, &target).map(|()| String::new()))?;
    let mine = |index: usize| index % collective.world_size() == collective.rank();
    let written = saved.write_parts(&staged, mine)?;
    let texts = agree(written.map(|parts| serde_json::to_string(&parts).expect("parts are JSON")), collective)?;
    on_rank_zero(collective, || commit(&staged, &target, saved.manifest, &texts).map(|()| String::new()))?;
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

impl Saved<'_> {
    /// Writes the parts that are `mine`. The outer error is a collective's; the inner one this rank's own, which keeps it from
    /// writing but not from giving the others what they need of it.
    fn write_parts(&self, staged: &Path, mine: impl Fn(usize) -> bool) -> Result<Result<Vec<Part>>> {
        let ranges = part_ranges(self.replica);
        let count = ranges.len();
        let names = self.optimizer.state_names();
        let prefixes: Vec<String> = names.iter().map(|name| format!("{name}.")).collect();
        let mut parts = Ok(Vec::new());
        for (index, range) in ranges.into_iter().enumerate() {
            let begin =
                |kind: &str, prefixes: &[&str]| PartFile::create(staged, &part_name(kind, index, count), &self.planned(&range, prefixes));
            let mut model = mine(index).then(|| begin("model", &[""]));
            let mut moments = mine(index).then(|| begin("optimizer", &prefixes.iter().map(String::as_str).collect::<Vec<_>>()));
            for stage in range.clone() {
                let params = self.replica.stages[stage].params();
                append(&mut model, params, &self.replica.parameters(stage)?);
                for name in 0..names.len() {
                    append(&mut moments, params, &self.state.whole(stage, name, self.replica)?);
                }
            }
            for part in [model, moments].into_iter().flatten() {
                parts = parts.and_then(|mut parts: Vec<Part>| {
                    parts.push(part.and_then(PartFile::finish)?);
                    Ok(parts)
                });
            }
        }
        Ok(parts)
    }

    /// Names and shapes of a part's tensors: stage by stage, prefix by prefix.
    fn planned(&self, range: &Range<usize>, prefixes: &[&str]) -> Vec<(String, Vec<i64>)> {
        let named = |stage: usize, prefix: &str| {
            let infos = self.replica.stages[stage].params().infos();
            infos.iter().map(|info| (format!("{prefix}{}", info.name), info.shape.clone())).collect::<Vec<_>>()
        };
        range.clone().flat_map(|stage| prefixes.iter().flat_map(move |prefix| named(stage, prefix))).collect()
    }
}

/// Writes a stage's tensors behind those that stand in the part; an error stays in its place.
fn append(part: &mut Option<Result<PartFile>>, params: &ParamSet, flat: &Tensor) {
    let Some(Ok(file)) = part else { return };
    if let Err(error) = params.split(flat).iter().try_for_each(|view| file.append(view)) {
        *part = Some(Err(error));
    }
}

/// `model-00001-of-00002.safetensors`.
fn part_name(kind: &str, index: usize, count: usize) -> String {
    format!("{kind}-{:05}-of-{count:05}.safetensors", index + 1)
}

/// Consecutive stages that share a part; depends on the model alone.
fn part_ranges(replica: &Replica<'_>) -> Vec<Range<usize>> {
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

/// A part being written.
struct PartFile {
    path: PathBuf,
    name: String,
    writer: safetensors::Writer<HashingWriter<BufWriter<File>>>,
}

impl PartFile {
    fn create(staged: &Path, name: &str, planned: &[(String, Vec<i64>)]) -> Result<Self> {
        let path = staged.join(name);
        let file = File::create_new(&path).map_err(Error::storage(&path, "create"))?;
        let tensors: Vec<_> = planned.iter().map(|(name, shape)| Planned { name, kind: Kind::Float, shape: shape.clone() }).collect();
        let hashing = HashingWriter::new(BufWriter::new(file));
        let writer = safetensors::Writer::begin(hashing, &tensors, &BTreeMap::new()).map_err(Error::storage(&path, "write"))?;
        Ok(PartFile { path, name: name.into(), writer })
    }

    fn append(&mut self, tensor: &Tensor) -> Result<()> {
        self.writer.tensor(tensor).map_err(Error::storage(&self.path, "write"))
    }

    fn finish(self) -> Result<Part> {
        let (buffered, sha256, bytes) = self.writer.finish().finish();
        let synced = buffered.into_inner().map_err(|error| error.into_error()).and_then(|file| file.sync_all());
        synced.map_err(Error::storage(&self.path, "write"))?;
        Ok(Part { file: self.name, bytes, sha256 })
    }
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
