//! Writes samples as a dataset. Nothing in the folder is half-written, `dataset.json` comes last,
//! and work that was killed goes on where it stopped.
//!
//! Several ranks write the files in turns, each with a log of its own of those that it has
//! finished. Rank 0 holds the folder for all, and writes what a dataset has once. Work that was
//! killed may go on with another number of ranks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::{Kind, Tensor};

use super::parallel::in_parallel;
use super::shards::{Plan, Shard, is_unequal, lengths_key};
use super::{Description, Samples};
use crate::collective::Collective;
use crate::collective::agreement::{agree, agreed, known_to_all, on_rank_zero};
use crate::data::DATASET_FILE;
use crate::error::{Error, Result};
use crate::files::disk::Disk;
use crate::files::durable::{LineFile, replace_file};
use crate::files::outputs::{Named, check_new_folder, hold};
use crate::files::safetensors::{Planned, Writer};
use crate::files::sha256::HashingWriter;
use crate::pulse;

/// Log of the files that rank 0 has finished, while a dataset is being written; its first line
/// names the samples and the plan.
const LOG: &str = "unfinished.jsonl";
/// Begin and end of the names of the logs, between which the other ranks' have their numbers.
const LOG_PARTS: (&str, &str) = ("unfinished", ".jsonl");
const CAPTIONS: &str = "captions.jsonl";

/// Options of writing a dataset.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// The folder to create, or one whose writing was interrupted.
    pub out: PathBuf,
    /// Largest size of a file; a larger sample gets a file of its own.
    pub shard_bytes: u64,
    /// Number of threads that read and write.
    pub jobs: usize,
    /// Order in which samples are written; that of their list if unset.
    pub order: Option<Vec<usize>>,
    /// Files to copy, by their entries in `dataset.json`.
    pub further: Vec<FurtherFile>,
}

/// A file that is copied as it is.
#[derive(Clone, Debug)]
pub struct FurtherFile {
    /// Its key in `dataset.json`.
    pub key: &'static str,
    pub path: PathBuf,
    /// The rest of its entry besides path and hash.
    pub entry: serde_json::Value,
}

/// Size of a dataset that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub samples: usize,
    pub files: usize,
    pub groups: usize,
}

/// A finished file, as the log and `dataset.json` list it.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Finished {
    path: String,
    sha256: String,
}

/// Writes all samples, then captions and `dataset.json`.
///
/// # Errors
/// [`Error::Config`] if there are no samples or `out` cannot be created; [`Error::Data`] if a
/// sample is not what its description says, or `out` holds something else; [`Error::Storage`]. An
/// error of a file is met by one rank alone, and ends the world.
///
/// # Ordering
/// Every rank calls it, with equal samples and options.
pub fn write_dataset(
    samples: &dyn Samples,
    description: &Description,
    options: &WriteOptions,
    collective: &dyn Collective,
) -> Result<Written> {
    let list = samples.list();
    if list.is_empty() {
        return Err(Error::config("data", "there are no samples to write"));
    }
    let order = options.order.clone().unwrap_or_else(|| (0..list.len()).collect());
    let repeats = |index| samples.repeats(index);
    let plan = Plan::new(list, &order, description.data_type, options.shard_bytes, repeats);
    let folder = Folder::open(&options.out, &plan.fingerprint(list), collective)?;
    let finished = folder.write_shards(samples, &plan, options.jobs, collective)?;
    on_rank_zero(collective, || {
        let mut document = json!({
            "format": "fm-dist dataset",
            "version": 2,
            "name": description.name,
            "source": description.source,
            "licence": description.licence,
            "data_type": description.data_type,
            "files": plan
                .shards
                .iter()
                .map(|shard| entry_of(shard, &finished[&shard.path]))
                .collect::<Vec<_>>(),
            "captions": folder.write_captions(samples, &plan)?,
        });
        for further in &options.further {
            document[further.key] = folder.copy(further)?;
        }
        folder.finish(&document).map(|()| String::new())
    })?;
    let groups: BTreeSet<&str> = plan.shards.iter().map(|shard| shard.group.as_str()).collect();
    Ok(Written { samples: order.len(), files: plan.shards.len(), groups: groups.len() })
}

/// Returns a file's entry in `dataset.json`.
fn entry_of(shard: &Shard, sha256: &str) -> serde_json::Value {
    let Shard { path, group, repeats, samples } = shard;
    let mut entry =
        json!({"path": path, "samples": samples.len(), "group": group, "sha256": sha256});
    if *repeats > 1 {
        entry["repeats"] = (*repeats).into();
    }
    entry
}

/// Hashes of finished files by path.
type Hashes = BTreeMap<String, String>;

/// A folder in which a dataset is being written.
struct Folder {
    path: PathBuf,
    log: Log,
    /// Files that are finished already.
    known: Hashes,
}

/// A rank's log, held while the folder is written, so that no other process writes it.
struct Log {
    path: PathBuf,
    lines: Mutex<LineFile>,
    _lock: File,
}

impl Log {
    fn open(path: PathBuf) -> Result<Self> {
        let lines = LineFile::open(&path).map_err(Error::storage(&path, "open"))?;
        let lock = File::options().read(true).write(true).open(&path);
        let lock = lock.map_err(Error::storage(&path, "open"))?;
        hold(&lock, path.parent().unwrap_or(Path::new(".")))?;
        Ok(Log { path, lines: Mutex::new(lines), _lock: lock })
    }

    fn note(&self, line: &str) -> Result<()> {
        let mut lines = lock(&self.lines);
        let appended = lines.append(line).and_then(|()| lines.sync());
        appended.map_err(Error::storage(&self.path, "write"))
    }
}

impl Folder {
    /// Creates the folder, or opens one in which the same plan was begun.
    fn open(path: &Path, fingerprint: &str, collective: &dyn Collective) -> Result<Self> {
        let plans = agree(Ok(fingerprint.into()), collective)?;
        if plans.iter().any(|plan| plan != fingerprint) {
            let what = "would be written from samples that changed while the ranks looked at them";
            return Err(known_to_all(Error::data(path, what), 0, collective));
        }
        let mut log = None;
        let known = on_rank_zero(collective, || {
            let (own, known) = begun(path, fingerprint)?;
            log = Some(own);
            Ok(serde_json::to_string(&known).expect("texts are JSON"))
        })?;
        let (begin, end) = LOG_PARTS;
        let opened = match log {
            Some(log) => Ok(log),
            None => Log::open(path.join(format!("{begin}-{}{end}", collective.rank()))),
        };
        let log = agreed(opened, collective)?;
        let known = serde_json::from_str(&known).expect("rank 0 wrote it");
        Ok(Folder { path: path.into(), log, known })
    }

    /// Writes the files that are missing, on threads of all ranks; returns the hashes of all.
    fn write_shards(
        &self,
        samples: &dyn Samples,
        plan: &Plan,
        jobs: usize,
        collective: &dyn Collective,
    ) -> Result<Hashes> {
        let missing = plan.shards.iter().filter(|shard| !self.known.contains_key(&shard.path));
        let own: Vec<&Shard> =
            missing.skip(collective.rank()).step_by(collective.world_size()).collect();
        let bar = progress(
            own.iter().map(|shard| shard.samples.len() as u64).sum(),
            pulse::is_root(collective.rank()),
        );
        let hashes = in_parallel(&own, jobs, |shard| {
            let hash = self.write_shard(samples, plan, shard)?;
            bar.inc(shard.samples.len() as u64);
            Ok((shard.path.clone(), hash))
        });
        bar.finish_and_clear();
        // After an error the other ranks still write; they end with this one.
        let hashes: Hashes = hashes?.into_iter().collect();
        let written = serde_json::to_string(&hashes).expect("texts are JSON");
        let mut all = self.known.clone();
        for hashes in agree(Ok(written), collective)? {
            all.extend(serde_json::from_str::<Hashes>(&hashes).expect("a rank wrote it"));
        }
        Ok(all)
    }

    fn write_shard(&self, samples: &dyn Samples, plan: &Plan, shard: &Shard) -> Result<String> {
        let tensors = read_all(samples, shard)?;
        let mut sha256 = String::new();
        let path = self.path.join(&shard.path);
        let beside = self.path.join(format!("{}.tmp", shard.path));
        // Left by a process that was killed.
        let _ = fs::remove_file(&beside);
        Disk::PLAIN.write_file(&beside, None, |file| {
            sha256 = write_file(file, samples, plan, shard, &tensors)?;
            Ok(())
        })?;
        Disk::PLAIN.rename(&beside, &path)?;
        let entry = Finished { path: shard.path.clone(), sha256 };
        self.log.note(&serde_json::to_string(&entry).expect("texts are JSON"))?;
        Ok(entry.sha256)
    }

    /// Writes a line for each sample, in the order of sample ids; returns the entry of the file.
    fn write_captions(&self, samples: &dyn Samples, plan: &Plan) -> Result<serde_json::Value> {
        let mut sha256 = String::new();
        replace_file(&self.path.join(CAPTIONS), |out| {
            let mut out = HashingWriter::new(out);
            for index in plan.shards.iter().flat_map(|shard| &shard.samples) {
                serde_json::to_writer(&mut out, &samples.list()[*index].caption)?;
                out.write_all(b"\n")?;
            }
            sha256 = out.finish().1;
            Ok(())
        })?;
        Ok(json!({"path": CAPTIONS, "sha256": sha256}))
    }

    fn copy(&self, further: &FurtherFile) -> Result<serde_json::Value> {
        let path = &further.path;
        let mut from = File::open(path).map_err(Error::storage(path, "open"))?;
        let name = format!("{}.safetensors", further.key);
        let mut sha256 = String::new();
        replace_file(&self.path.join(&name), |out| {
            let mut out = HashingWriter::new(out);
            io::copy(&mut from, &mut out)?;
            sha256 = out.finish().1;
            Ok(())
        })?;
        let mut entry = further.entry.clone();
        (entry["path"], entry["sha256"]) = (name.into(), sha256.into());
        Ok(entry)
    }

    /// Writes `dataset.json`, which makes the folder a dataset, and removes the logs.
    fn finish(&self, document: &serde_json::Value) -> Result<()> {
        let text = serde_json::to_string_pretty(document).expect("texts and numbers are JSON");
        replace_file(&self.path.join(DATASET_FILE), |out| writeln!(out, "{text}"))?;
        // Rank 0's goes last: without it, the folder would not be taken for one to go on with.
        let mut logs = logs(&self.path)?;
        logs.retain(|log| *log != self.log.path);
        let remove = |log: &PathBuf| fs::remove_file(log).map_err(Error::storage(log, "delete"));
        logs.iter().chain([&self.log.path]).try_for_each(remove)
    }
}

/// Creates the folder, or opens one in which the same plan was begun; returns rank 0's log and the
/// finished files.
fn begun(path: &Path, fingerprint: &str) -> Result<(Log, Hashes)> {
    check_new_folder(Named { argument: "--out", path })?;
    let own = path.join(LOG);
    if path.exists() && !own.exists() && !is_empty(path)? {
        return Err(Error::data(path, "exists already; a dataset is written into a new folder"));
    }
    fs::create_dir_all(path).map_err(Error::storage(path, "create"))?;
    let log = Log::open(own)?;
    let first = lines_of(&log.path)?.next();
    match first.filter(|line| !line.is_empty()) {
        None => {
            log.note(fingerprint)?;
            return Ok((log, Hashes::new()));
        }
        Some(begun) if begun == fingerprint => {}
        Some(_) => {
            let what = "holds an unfinished dataset of other samples or file sizes; remove it, or \
                        give another --out";
            return Err(Error::data(path, what));
        }
    }
    let mut known = Hashes::new();
    for log in logs(path)? {
        // The plan's name is no JSON, nor is a last line that was cut by a crash; its file is
        // written again.
        let entries = lines_of(&log)?.filter_map(|line| serde_json::from_str(&line).ok());
        known.extend(entries.map(|Finished { path, sha256 }| (path, sha256)));
    }
    known.retain(|file, _| path.join(file).is_file());
    Ok((log, known))
}

/// Returns the logs of all ranks that have written into a folder.
fn logs(folder: &Path) -> Result<Vec<PathBuf>> {
    let (begin, end) = LOG_PARTS;
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(Error::storage(folder, "list"))?;
    let is_log = |name: &str| name.starts_with(begin) && name.ends_with(end);
    let logs = entries.iter().filter(|entry| is_log(&entry.file_name().to_string_lossy()));
    Ok(logs.map(fs::DirEntry::path).collect())
}

fn lines_of(log: &Path) -> Result<impl Iterator<Item = String> + use<>> {
    let file = File::open(log).map_err(Error::storage(log, "open"))?;
    Ok(BufReader::new(file).lines().map_while(io::Result::ok))
}

fn read_all(samples: &dyn Samples, shard: &Shard) -> Result<Vec<BTreeMap<String, Tensor>>> {
    let read = |index: &usize| {
        let (sample, tensors) = (&samples.list()[*index], samples.read(*index)?);
        let described = sample.layout.iter().map(|(key, tensor)| (key, tensor.kind, &tensor.shape));
        let found: Vec<(&String, Kind, Vec<i64>)> =
            tensors.iter().map(|(key, tensor)| (key, tensor.kind(), tensor.size())).collect();
        let fits = described.eq(found.iter().map(|(key, kind, shape)| (*key, *kind, shape)));
        match fits {
            true => Ok(tensors),
            false => Err(Error::data(&sample.origin, "was changed while it was read")),
        }
    };
    shard.samples.iter().map(read).collect()
}

/// Writes the samples of one file, key by key; returns its hash.
fn write_file(
    file: &mut dyn Write,
    samples: &dyn Samples,
    plan: &Plan,
    shard: &Shard,
    tensors: &[BTreeMap<String, Tensor>],
) -> io::Result<String> {
    let layout = &samples.list()[shard.samples[0]].layout;
    let count = tensors.len() as i64;
    let mut planned = Vec::new();
    let names: Vec<(&String, String)> = layout.keys().map(|key| (key, lengths_key(key))).collect();
    for (key, lengths) in &names {
        let (kind, shape) = (layout[*key].kind, &layout[*key].shape);
        if is_unequal(key, layout, &plan.unequal) {
            let tokens: i64 = tensors.iter().map(|sample| sample[*key].size()[0]).sum();
            let shape = [&[tokens.max(1)], &shape[1..]].concat();
            planned.push(Planned { name: key, kind, shape });
            planned.push(Planned { name: lengths, kind: Kind::Int64, shape: vec![count] });
        } else {
            planned.push(Planned { name: key, kind, shape: [&[count], &shape[..]].concat() });
        }
    }
    let mut writer = Writer::begin(HashingWriter::new(file), &planned, &BTreeMap::new())?;
    for (key, _) in &names {
        tensors.iter().try_for_each(|sample| writer.tensor(&sample[*key]))?;
        if is_unequal(key, layout, &plan.unequal) {
            let lengths: Vec<i64> = tensors.iter().map(|sample| sample[*key].size()[0]).collect();
            if lengths.iter().all(|length| *length == 0) {
                let unused = [&[1], &layout[*key].shape[1..]].concat();
                let options = (layout[*key].kind, tch::Device::Cpu);
                writer.tensor(&Tensor::zeros(unused, options))?;
            }
            writer.tensor(&Tensor::from_slice(&lengths))?;
        }
    }
    Ok(writer.finish().finish().1)
}

/// Returns a bar that counts samples, hidden unless `shown`, which is true on one rank only.
pub(super) fn progress(samples: u64, shown: bool) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:28.blue} {pos}/{len} samples, {eta} left");
    // Hidden where standard error is no terminal.
    let bar = if shown { ProgressBar::new(samples) } else { ProgressBar::hidden() };
    bar.with_style(style.expect("the template is valid"))
}

fn is_empty(folder: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(folder).map_err(Error::storage(folder, "list"))?;
    Ok(entries.next().is_none())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
