//! One folder a run: where it lies, which checkpoint it goes on from, what is kept.
//!
//! `config.toml`, `metrics.jsonl`, `log/`, `step-NNNNNNNN/`, `starts.json`, `report.html`, `loss.png`; `run.lock` while it runs. Only
//! the names of the checkpoints tell which is the newest; a file called `latest` is nobody's.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::agreement::on_rank_zero;
use super::checkpoint::{self, Unfit};
use super::lock::RunLock;
use super::starts;
use crate::collective::Collective;
use crate::config::RunConfig;
use crate::data::safetensors::refuse_pickled_weights;
use crate::error::{Error, Result};
use crate::telemetry::replace_file;

const CONFIG: &str = "config.toml";
/// More than is read of any configuration.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Where a run begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// At step 0, in a folder of its own.
    #[default]
    Never,
    /// At the newest checkpoint that verifies, of the newest run at `output_dir` that has any.
    Latest,
    /// At this checkpoint, or at the newest of this run folder.
    From(PathBuf),
}

impl FromStr for Resume {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "never" => Resume::Never,
            "latest" => Resume::Latest,
            folder => Resume::From(folder.into()),
        })
    }
}

/// The folder of this run, agreed on by all ranks.
#[derive(Debug, Deserialize, Serialize)]
pub struct RunFolder {
    path: PathBuf,
    resumed_from: Option<PathBuf>,
    /// What was set aside on the way; said once somebody listens.
    warnings: Vec<String>,
    /// Rank 0's, for as long as the run lives.
    #[serde(skip)]
    lock: Option<RunLock>,
}

impl RunFolder {
    /// Rank 0 finds or makes the folder and locks it, and the others follow.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] if a resume was asked for and nothing verifies; [`Error::NoProgress`] after starts that led
    /// nowhere; [`Error::Config`] if another run has the folder; [`Error::CheckpointMismatch`]; [`Error::Storage`].
    pub fn open(config: &RunConfig, resume: &Resume, collective: &dyn Collective) -> Result<Self> {
        let mut lock = None;
        let open = || {
            let mut folder = choose(config, resume)?;
            lock = folder.lock.take();
            Ok(serde_json::to_string(&folder).expect("paths are UTF-8 on the machines that this is built for"))
        };
        let text = on_rank_zero(collective, open)?;
        let folder: RunFolder = serde_json::from_str(&text).expect("rank 0 sent a run folder");
        Ok(RunFolder { lock, ..folder })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checkpoint that the run goes on from.
    pub fn resumed_from(&self) -> Option<&Path> {
        self.resumed_from.as_deref()
    }

    /// What rank 0 had to set aside to find it.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Notes that the run goes on from `step` towards `max_steps`; rank 0 does. One that has arrived has nowhere to go, and
    /// that is no failure.
    pub fn note_start(&self, step: u64, max_steps: u64, collective: &dyn Collective) -> Result<()> {
        let note = || if step < max_steps { starts::note(&self.path, step) } else { Ok(()) };
        on_rank_zero(collective, || note().map(|()| String::new())).map(drop)
    }

    /// Writes the resolved configuration beside the results; rank 0 does.
    pub fn keep_config(&self, config: &RunConfig, collective: &dyn Collective) -> Result<()> {
        let write = || replace_file(&self.path.join(CONFIG), |file| file.write_all(config.to_toml().as_bytes()));
        on_rank_zero(collective, || write().map(|()| String::new())).map(drop)
    }
}

/// The configuration of the run at `folder`.
///
/// # Errors
/// [`Error::Storage`] if it is no run folder.
pub fn config_of(folder: &Path) -> Result<RunConfig> {
    let path = folder.join(CONFIG);
    let text = checkpoint::read_whole(&path, MAX_CONFIG_BYTES).map_err(Error::storage(&path, "read"))?;
    let text = String::from_utf8(text).map_err(|_| Error::config("text", format!("{} is not UTF-8", path.display())))?;
    RunConfig::read(&path.display().to_string(), &text, &[])
}

/// The run folder and the checkpoint that a path means: itself, or its newest.
///
/// # Errors
/// [`Error::NoCheckpoint`], [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn locate(path: &Path) -> Result<(PathBuf, PathBuf)> {
    if checkpoint::is_checkpoint(path) {
        checkpoint::verify(path).map_err(|unfit| unfit.into_error(path))?;
        return Ok((run_of(path), path.into()));
    }
    loop {
        let list = if path.is_dir() { checkpoint::list(path)? } else { Vec::new() };
        let none = || Error::NoCheckpoint { path: path.into(), what: "holds no checkpoint".into() };
        let (_, folder) = list.into_iter().next_back().ok_or_else(none)?;
        match checkpoint::verify(&folder) {
            Ok(_) => return Ok((path.into(), folder)),
            // A run that goes on has deleted it for a newer one meanwhile.
            Err(_) if !folder.exists() => {}
            // A newest one that is broken is an error: samples of an older one would pass for the run's.
            Err(unfit) => return Err(unfit.into_error(&folder)),
        }
    }
}

/// The run that a checkpoint's folder lies in.
fn run_of(checkpoint: &Path) -> PathBuf {
    let parent = checkpoint.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new(".")).into()
}

fn choose(config: &RunConfig, resume: &Resume) -> Result<RunFolder> {
    let output_dir = Path::new(&config.output_dir);
    match resume {
        Resume::Never => {
            let path = create_fresh(output_dir)?;
            let (lock, taken_over) = RunLock::take(&path)?;
            Ok(RunFolder { path, resumed_from: None, warnings: taken_over.into_iter().collect(), lock: Some(lock) })
        }
        Resume::Latest => {
            // A run that ended before its first checkpoint has nothing to go on from.
            let has_checkpoint = |folder: &PathBuf| checkpoint::list(folder).is_ok_and(|list| !list.is_empty());
            let newest = numbered(output_dir).into_iter().rev().find(has_checkpoint);
            resume_run(&newest.unwrap_or_else(|| output_dir.into()), Some(config.max_steps))
        }
        Resume::From(folder) if checkpoint::is_checkpoint(folder) => resume_checkpoint(folder),
        Resume::From(folder) => {
            refuse_pickled_weights(folder)?;
            resume_run(folder, None)
        }
    }
}

/// At this very checkpoint.
fn resume_checkpoint(folder: &Path) -> Result<RunFolder> {
    let run = run_of(folder);
    let (lock, taken_over) = RunLock::take(&run)?;
    checkpoint::clear_leftovers(&run)?;
    checkpoint::verify(folder).map_err(|unfit| unfit.into_error(folder))?;
    refuse_newer(&run, folder)?;
    let warnings = taken_over.into_iter().collect();
    Ok(RunFolder { path: run, resumed_from: Some(folder.into()), warnings, lock: Some(lock) })
}

/// At the newest checkpoint that verifies; newer ones that do not are set aside, loudly. Where nobody named the run, one that
/// gets nowhere before `guarded_until` is not started for ever.
fn resume_run(run: &Path, guarded_until: Option<u64>) -> Result<RunFolder> {
    let list = if run.is_dir() { checkpoint::list(run)? } else { Vec::new() };
    if list.is_empty() {
        let what = "holds no checkpoint; start with --resume never".into();
        return Err(Error::NoCheckpoint { path: run.into(), what });
    }
    let (lock, taken_over) = RunLock::take(run)?;
    checkpoint::clear_leftovers(run)?;
    let (step, chosen, broken) = newest_sound(run)?;
    if guarded_until.is_some_and(|last| step < last) {
        starts::guard(run, step)?;
    }
    let mut warnings: Vec<String> = taken_over.into_iter().collect();
    for (bad, path, what) in broken {
        let kept = set_aside(&path)?;
        let (bad_name, redone) = (checkpoint::folder_name(bad), bad - step);
        let using = checkpoint::folder_name(step);
        warnings
            .push(format!("{bad_name} failed its check ({what}); using {using}; {redone} steps will be redone; bad one kept as {kept}"));
    }
    Ok(RunFolder { path: run.into(), resumed_from: Some(chosen), warnings, lock: Some(lock) })
}

/// A checkpoint that failed its check: its step, its folder, what failed.
type Broken = (u64, PathBuf, String);

/// The newest checkpoint that verifies, and the newer ones that do not.
///
/// # Errors
/// [`Error::NoCheckpoint`] if none does; whatever another checkpoint would not mend.
fn newest_sound(run: &Path) -> Result<(u64, PathBuf, Vec<Broken>)> {
    let mut broken = Vec::new();
    for (step, path) in checkpoint::list(run)?.into_iter().rev() {
        match checkpoint::verify(&path) {
            Ok(_) => return Ok((step, path, broken)),
            Err(Unfit::Corrupt { file, what }) => broken.push((step, path, format!("{file}: {what}"))),
            Err(Unfit::Other(error)) => return Err(error),
        }
    }
    let texts: Vec<String> = broken.iter().map(|(step, _, what)| format!("{} ({what})", checkpoint::folder_name(*step))).collect();
    let what = format!("none of its {} checkpoints verifies: {}", broken.len(), texts.join(", "));
    Err(Error::NoCheckpoint { path: run.into(), what })
}

/// Keeps it under the first free of `.bad-1`, `.bad-2`, …; returns the name.
fn set_aside(path: &Path) -> Result<String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let names = (1..).map(|number| format!("{name}.bad-{number}"));
    let free = names.into_iter().find(|name| !path.with_file_name(name).exists()).expect("numbers are endless");
    fs::rename(path, path.with_file_name(&free)).map_err(Error::storage(path, "set aside"))?;
    Ok(free)
}

/// A run may not write over its own future: going on from an old checkpoint needs the newer ones out of the way.
fn refuse_newer(run: &Path, chosen: &Path) -> Result<()> {
    let newer: Vec<String> = checkpoint::list(run)?
        .iter()
        .rev()
        .take_while(|(_, path)| path.file_name() != chosen.file_name())
        .map(|(_, path)| path.display().to_string())
        .collect();
    if newer.is_empty() {
        return Ok(());
    }
    Err(Error::checkpoint_mismatch(chosen, format!("newer checkpoints stand in the same run: {}; move them away first", newer.join(", "))))
}

/// Makes `output_dir`, or the first of `output_dir-2`, `-3`, … that no run has.
fn create_fresh(output_dir: &Path) -> Result<PathBuf> {
    let candidates = std::iter::once(output_dir.to_path_buf()).chain((2..).map(|number| with_number(output_dir, number)));
    for folder in candidates {
        match fs::create_dir_all(&folder).and_then(|()| File::create_new(folder.join(CONFIG))) {
            Ok(_) => return Ok(folder),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(source) => return Err(Error::Storage { path: folder, operation: "create", source }),
        }
    }
    unreachable!("the candidates are endless")
}

/// `output_dir`, `output_dir-2`, … as far as they exist without a gap, oldest first.
fn numbered(output_dir: &Path) -> Vec<PathBuf> {
    let first = std::iter::once(output_dir.to_path_buf());
    first.chain((2..).map(|number| with_number(output_dir, number))).take_while(|folder| folder.join(CONFIG).exists()).collect()
}

fn with_number(folder: &Path, number: u64) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!("{name}-{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(output: &Path) -> RunConfig {
        RunConfig { output_dir: output.display().to_string(), ..RunConfig::default() }
    }

    #[test]
    fn a_second_run_gets_a_folder_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("digits");
        let folders: Vec<PathBuf> = (0..3).map(|_| create_fresh(&output).unwrap()).collect();
        assert_eq!(folders, [output.clone(), root.path().join("digits-2"), root.path().join("digits-3")]);
        assert_eq!(numbered(&output), folders);
    }

    #[test]
    fn the_latest_run_is_the_newest_that_has_a_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("digits");
        let folders: Vec<PathBuf> = (0..3).map(|_| create_fresh(&output).unwrap()).collect();
        fs::create_dir(folders[1].join(checkpoint::folder_name(5))).unwrap();
        let error = choose(&config(&output), &Resume::Latest).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: none of its 1 checkpoints verifies", folders[1].display())), "{error}");
    }

    #[test]
    fn a_resume_without_a_checkpoint_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let error = choose(&config(root.path()), &Resume::Latest).unwrap_err();
        assert_eq!(error.exit_code(), 44);
    }
}
