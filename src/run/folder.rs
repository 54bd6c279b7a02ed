//! One folder for each run, and its contents.
//!
//! `config.toml`, `metrics.jsonl`, `log/`, `step-NNNNNNNN/`, `starts.json`, `report.html`,
//! `loss.png`; the link `best` to the checkpoint of the lowest validation loss; `run.lock` while
//! the run is alive; `config-1.toml`, … are the configurations before a resume changed them. Only
//! the names of the checkpoints tell which one is the newest; a file called `latest` is neither
//! read nor written.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::collective::Collective;
use crate::collective::agreement::on_rank_zero;
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::run::changes;
use crate::run::checkpoint;
use crate::run::length::Length;
use crate::run::lock::RunLock;
use crate::run::resume::{Resume, choose};
use crate::run::resume_log;
use crate::run::runs::{CONFIG, REPORT};

/// Maximum size of a configuration file that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// This run's folder, agreed on by all ranks.
#[derive(Debug, Deserialize, Serialize)]
pub struct RunFolder {
    pub(super) path: PathBuf,
    pub(super) resumed_from: Option<Checkpoint>,
    /// True if the report of the last step is written, or the run is beyond that.
    pub(super) is_over: bool,
    /// True if the run does not belong to `output_dir`, so that the configuration kept in it must
    /// not name that.
    pub(super) is_elsewhere: bool,
    /// Warnings about folders and checkpoints that were skipped, taken over or set aside; logged
    /// once the log is open.
    pub(super) warnings: Vec<String>,
    /// The lock, on rank 0, held for as long as the run lives.
    #[serde(skip)]
    pub(super) lock: Option<RunLock>,
}

/// A checkpoint to resume from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Checkpoint {
    pub path: PathBuf,
    pub step: u64,
    pub samples_seen: u64,
    /// The checkpoint of another run that it is a copy of.
    pub copy_of: Option<PathBuf>,
}

impl RunFolder {
    /// Finds or makes the folder and locks it on rank 0, and shares it with the other ranks.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] if a resume was requested and no checkpoint verifies;
    /// [`Error::NoProgress`] after repeated starts without progress; [`Error::Config`] if another
    /// run has the folder or the path is not a run folder; [`Error::CheckpointMismatch`];
    /// [`Error::Storage`].
    pub fn open(
        config: &RunConfig,
        resume: &Resume,
        length: Length,
        collective: &dyn Collective,
    ) -> Result<Self> {
        let mut lock = None;
        let open = || {
            let mut folder = choose(config, resume, length)?;
            lock = folder.lock.take();
            serde_json::to_string(&folder).map_err(|error| {
                Error::config(
                    "output_dir",
                    format!("{}: {error}; rename the folder", folder.path.display()),
                )
            })
        };
        let text = on_rank_zero(collective, open)?;
        let folder: RunFolder = serde_json::from_str(&text).expect("rank 0 sent a run folder");
        Ok(RunFolder { lock, ..folder })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the checkpoint that the run resumes from.
    pub fn resumed_from(&self) -> Option<&Path> {
        self.resumed_from.as_ref().map(|checkpoint| &*checkpoint.path)
    }

    /// Returns the checkpoint of another run that this run branches off.
    pub fn branches_off(&self) -> Option<&Path> {
        self.resumed_from.as_ref()?.copy_of.as_deref()
    }

    /// Returns rank 0's warnings about folders and checkpoints that it skipped, took over or set
    /// aside.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the last step of a run of this length that goes on in the folder.
    pub fn last_step(&self, length: Length) -> u64 {
        let done = self.resumed_from.as_ref();
        let (step, seen) = done.map_or((0, 0), |done| (done.step, done.samples_seen));
        length.last_step(step, seen)
    }

    /// Returns a message if there is no step left to do, in which case nothing in the folder
    /// changes; `None` otherwise.
    pub fn nothing_to_do(&self, length: Length) -> Option<String> {
        let Checkpoint { step, .. } = self.resumed_from.as_ref().filter(|_| self.is_over)?;
        Some(format!(
            "nothing to do: step {step} of {} is done in {}; a larger {} goes on",
            self.last_step(length),
            self.path.display(),
            length.key()
        ))
    }

    /// Records on rank 0 that the run continues from `step` towards `max_steps`, and deletes the
    /// report of an earlier end, which would call the run over. A run that has already reached
    /// `max_steps` is not recorded, since making no progress is no failure there.
    pub fn note_start(&self, step: u64, max_steps: u64, collective: &dyn Collective) -> Result<()> {
        let note = || {
            if step >= max_steps {
                return Ok(());
            }
            let report = self.path.join(REPORT);
            match fs::remove_file(&report) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::storage(&report, "delete")(error));
                }
                _ => (),
            }
            resume_log::note(&self.path, step)
        };
        on_rank_zero(collective, || note().map(|()| String::new())).map(drop)
    }

    /// Takes back on rank 0 what [`note_start`](Self::note_start) recorded, of a start that was
    /// asked to stop before it could make progress.
    pub fn forget_start(
        &self,
        step: u64,
        max_steps: u64,
        collective: &dyn Collective,
    ) -> Result<()> {
        let forget = || if step < max_steps { resume_log::forget(&self.path) } else { Ok(()) };
        on_rank_zero(collective, || forget().map(|()| String::new())).map(drop)
    }

    /// Writes the resolved configuration beside the results, and logs the changes that a resume
    /// makes; rank 0 does both. A configuration that is replaced is kept as `config-1.toml`, or the
    /// next free number.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn keep_config(&self, config: &RunConfig, collective: &dyn Collective) -> Result<()> {
        let keep = || match &self.resumed_from {
            None => self.write_config(config),
            Some(checkpoint) => self.change_config(config, checkpoint),
        };
        on_rank_zero(collective, || keep().map(|()| String::new())).map(drop)
    }

    fn write_config(&self, config: &RunConfig) -> Result<()> {
        replace_file(&self.path.join(CONFIG), |file| file.write_all(config.to_toml().as_bytes()))
    }

    fn change_config(&self, config: &RunConfig, checkpoint: &Checkpoint) -> Result<()> {
        let text =
            checkpoint::read_whole(&self.path.join(CONFIG), MAX_CONFIG_BYTES).unwrap_or_default();
        let before = std::str::from_utf8(&text).ok().and_then(changes::values_of_listing);
        let mut config = config.clone();
        if self.is_elsewhere {
            let own = before.as_ref().and_then(|before| changes::text_of(before, "output_dir"));
            config.output_dir = own.unwrap_or_else(|| self.path.display().to_string());
        }
        let now = changes::values(&config);
        // The checkpoint's record takes precedence over later edits of config.toml.
        let record = checkpoint::recorded(&checkpoint.path)?;
        let listed = match &before {
            Some(before) => changes::listed(&changes::with_record(before, &record), &now),
            None => changes::listed(&changes::completed(&record), &changes::recorded(&config)),
        };
        let is_kept = before.as_ref() == Some(&now);
        let kept = if is_kept || text.is_empty() {
            String::new()
        } else {
            format!("; the configuration before is {}", self.keep(&text)?)
        };
        if !listed.is_empty() {
            tracing::info!(
                "configuration changed since step {}: {}{kept}",
                checkpoint.step,
                listed.join("; ")
            );
        }
        if is_kept { Ok(()) } else { self.write_config(&config) }
    }

    /// Writes a configuration under the first free name of `config-1.toml`, `config-2.toml`, …;
    /// returns the name.
    fn keep(&self, text: &[u8]) -> Result<String> {
        let name = first_free((1..).map(|number| format!("config-{number}.toml")), &self.path);
        replace_file(&self.path.join(&name), |file| file.write_all(text))?;
        Ok(name)
    }
}

/// Reads the configuration of the run at `folder`.
///
/// # Errors
/// [`Error::Storage`] if it is not a run folder.
pub fn config_of(folder: &Path) -> Result<RunConfig> {
    let path = folder.join(CONFIG);
    let text =
        checkpoint::read_whole(&path, MAX_CONFIG_BYTES).map_err(Error::storage(&path, "read"))?;
    let text = String::from_utf8(text)
        .map_err(|_| Error::config("text", format!("{} is not UTF-8", path.display())))?;
    RunConfig::read_listing(&path.display().to_string(), &text)
}

/// Returns the first of these names that no file in a folder has.
pub(super) fn first_free(mut names: impl Iterator<Item = String>, folder: &Path) -> String {
    names.find(|name| !folder.join(name).exists()).expect("numbers are endless")
}
