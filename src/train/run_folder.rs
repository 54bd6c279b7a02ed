//! One folder a run: where it lies, which checkpoint it goes on from, what is kept.
//!
//! `config.toml`, `metrics.jsonl`, `log/`, `step-NNNNNNNN/`, `report.html`, `loss.png`.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::agreement::on_rank_zero;
use super::checkpoint;
use crate::collective::Collective;
use crate::config::RunConfig;
use crate::error::{Error, Result};

const CONFIG: &str = "config.toml";

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
}

impl RunFolder {
    /// Rank 0 finds or makes the folder, and the others follow.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] if a resume was asked for and nothing verifies; [`Error::Storage`].
    pub fn open(output_dir: &str, resume: &Resume, collective: &dyn Collective) -> Result<Self> {
        let text = on_rank_zero(collective, || Ok(json(&choose(Path::new(output_dir), resume)?)))?;
        Ok(serde_json::from_str(&text).expect("rank 0 sent a run folder"))
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

    /// Folder of the checkpoint at `step`.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.path.join(checkpoint::folder_name(step))
    }

    /// Writes the resolved configuration beside the results; rank 0 does.
    pub fn keep_config(&self, config: &RunConfig, collective: &dyn Collective) -> Result<()> {
        let write = || {
            let path = self.path.join(CONFIG);
            let mut file = File::create(&path).map_err(Error::storage(&path, "create"))?;
            file.write_all(config.to_toml().as_bytes()).map_err(Error::storage(&path, "write"))?;
            Ok(String::new())
        };
        on_rank_zero(collective, write).map(drop)
    }

    /// Deletes all but the newest `keep_last` checkpoints; rank 0 does, after the newest is safe.
    pub fn prune(&self, keep_last: u64, collective: &dyn Collective) -> Result<()> {
        let delete = || {
            for (_, path) in checkpoint::list(&self.path)?.into_iter().rev().skip(keep_last as usize) {
                fs::remove_dir_all(&path).map_err(Error::storage(&path, "delete"))?;
            }
            Ok(String::new())
        };
        on_rank_zero(collective, delete).map(drop)
    }
}

/// The configuration of the run at `folder`.
///
/// # Errors
/// [`Error::Storage`] if it is no run folder.
pub fn config_of(folder: &Path) -> Result<RunConfig> {
    let path = folder.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(Error::storage(&path, "read"))?;
    RunConfig::read(&path.display().to_string(), &text, &[])
}

/// The run folder and the checkpoint that a path means: itself, or its newest.
///
/// # Errors
/// [`Error::NoCheckpoint`], [`Error::CheckpointMismatch`].
pub fn locate(path: &Path) -> Result<(PathBuf, PathBuf)> {
    if checkpoint::is_checkpoint(path) {
        checkpoint::verify(path)?;
        return Ok((path.parent().unwrap_or(Path::new(".")).into(), path.into()));
    }
    let list = if path.is_dir() { checkpoint::list(path)? } else { Vec::new() };
    let none = || Error::NoCheckpoint { path: path.into(), what: "holds no checkpoint".into() };
    let (_, folder) = list.into_iter().next_back().ok_or_else(none)?;
    // A newest one that is broken is an error: samples of an older one would pass for the run's.
    checkpoint::verify(&folder)?;
    Ok((path.into(), folder))
}

fn choose(output_dir: &Path, resume: &Resume) -> Result<RunFolder> {
    match resume {
        Resume::Never => Ok(RunFolder { path: create_fresh(output_dir)?, resumed_from: None, warnings: Vec::new() }),
        Resume::Latest => {
            // A run that ended before its first checkpoint has nothing to go on from.
            let has_checkpoint = |folder: &PathBuf| checkpoint::list(folder).is_ok_and(|list| !list.is_empty());
            let newest = numbered(output_dir).into_iter().rev().find(has_checkpoint);
            resume_run(&newest.unwrap_or_else(|| output_dir.into()))
        }
        Resume::From(folder) if checkpoint::is_checkpoint(folder) => {
            checkpoint::verify(folder)?;
            let run = folder.parent().unwrap_or(Path::new(".")).to_path_buf();
            refuse_newer(&run, folder)?;
            Ok(RunFolder { path: run, resumed_from: Some(folder.clone()), warnings: Vec::new() })
        }
        Resume::From(folder) => resume_run(folder),
    }
}

/// Newest checkpoint of a run that verifies; newer ones that do not are set aside, loudly.
fn resume_run(run: &Path) -> Result<RunFolder> {
    let list = if run.is_dir() { checkpoint::list(run)? } else { Vec::new() };
    let mut warnings = Vec::new();
    for (_, path) in list.iter().rev() {
        match checkpoint::verify(path) {
            Ok(_) => return Ok(RunFolder { path: run.into(), resumed_from: Some(path.clone()), warnings }),
            Err(error) => warnings.push(set_aside(path, &error)?),
        }
    }
    let what = match list.len() {
        0 => "holds no checkpoint; start with --resume never".to_string(),
        count => format!("none of its {count} checkpoints verifies"),
    };
    Err(Error::NoCheckpoint { path: run.into(), what })
}

/// Returns what to say of it.
fn set_aside(path: &Path, error: &Error) -> Result<String> {
    let aside = path.with_extension("bad");
    fs::rename(path, &aside).map_err(Error::storage(path, "set aside"))?;
    Ok(format!("{error}; going on from the checkpoint before it, steps since then are done again; kept as {}", aside.display()))
}

fn json(folder: &RunFolder) -> String {
    serde_json::to_string(folder).expect("paths are UTF-8 on the machines that this is built for")
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
        let error = choose(&output, &Resume::Latest).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: none of its 1 checkpoints verifies", folders[1].display())), "{error}");
    }

    #[test]
    fn a_resume_without_a_checkpoint_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let error = choose(root.path(), &Resume::Latest).unwrap_err();
        assert_eq!(error.exit_code(), 44);
    }
}
