//! One folder a run, and what is kept in it.
//!
//! `config.toml`, `metrics.jsonl`, `log/`, `step-NNNNNNNN/`, `starts.json`, `report.html`,
//! `loss.png`; `run.lock` while it runs; `config-1.toml`, … are configurations before a resume
//! changed them. Only the names of the checkpoints tell which is the newest of a run; a file called
//! `latest` is nobody's.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::collective::Collective;
use crate::collective::agreement::on_rank_zero;
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::run::changes;
use crate::run::checkpoint;
use crate::run::lock::RunLock;
use crate::run::resume::{Resume, choose};
use crate::run::resume_log;
use crate::run::runs::CONFIG;

/// More than is read of any configuration.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The folder of this run, agreed on by all ranks.
#[derive(Debug, Deserialize, Serialize)]
pub struct RunFolder {
    pub(super) path: PathBuf,
    pub(super) resumed_from: Option<Checkpoint>,
    /// The report of the last step is written, or the run is beyond `max_steps`.
    pub(super) is_over: bool,
    /// The run is none of `output_dir`'s, which therefore is not what its configuration shall name.
    pub(super) is_elsewhere: bool,
    /// Lines about folders and checkpoints that were passed over, taken over or set aside; said
    /// once somebody listens.
    pub(super) warnings: Vec<String>,
    /// Rank 0's, for as long as the run lives.
    #[serde(skip)]
    pub(super) lock: Option<RunLock>,
}

/// A checkpoint to go on from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Checkpoint {
    pub path: PathBuf,
    pub step: u64,
}

impl RunFolder {
    /// Rank 0 finds or makes the folder and locks it, and the others follow.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] if a resume was asked for and nothing verifies;
    /// [`Error::NoProgress`] after starts that led nowhere; [`Error::Config`] if another run has
    /// the folder or it is none; [`Error::CheckpointMismatch`]; [`Error::Storage`].
    pub fn open(config: &RunConfig, resume: &Resume, collective: &dyn Collective) -> Result<Self> {
        let mut lock = None;
        let open = || {
            let mut folder = choose(config, resume)?;
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

    /// The checkpoint that the run goes on from.
    pub fn resumed_from(&self) -> Option<&Path> {
        self.resumed_from.as_ref().map(|checkpoint| &*checkpoint.path)
    }

    /// Lines of rank 0 about what it passed over, took over or set aside.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The line of a start that has no step left to do; nothing in the folder changes by it.
    pub fn nothing_to_do(&self, max_steps: u64) -> Option<String> {
        let Checkpoint { step, .. } = self.resumed_from.as_ref().filter(|_| self.is_over)?;
        Some(format!(
            "nothing to do: step {step} of {max_steps} is done in {}; a larger max_steps goes on",
            self.path.display()
        ))
    }

    /// Notes that the run goes on from `step` towards `max_steps`; rank 0 does. One that has
    /// arrived has nowhere to go, and that is no failure.
    pub fn note_start(&self, step: u64, max_steps: u64, collective: &dyn Collective) -> Result<()> {
        let note = || if step < max_steps { resume_log::note(&self.path, step) } else { Ok(()) };
        on_rank_zero(collective, || note().map(|()| String::new())).map(drop)
    }

    /// Writes the resolved configuration beside the results, and says what a resume changes in it;
    /// rank 0 does. A configuration that changes is kept as `config-1.toml`, or the next free
    /// number.
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
        // What the checkpoint records holds also where somebody has written into config.toml since.
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

    /// Writes a configuration under the first free of `config-1.toml`, `config-2.toml`, …; returns
    /// the name.
    fn keep(&self, text: &[u8]) -> Result<String> {
        let name = first_free((1..).map(|number| format!("config-{number}.toml")), &self.path);
        replace_file(&self.path.join(&name), |file| file.write_all(text))?;
        Ok(name)
    }
}

/// The configuration of the run at `folder`.
///
/// # Errors
/// [`Error::Storage`] if it is no run folder.
pub fn config_of(folder: &Path) -> Result<RunConfig> {
    let path = folder.join(CONFIG);
    let text =
        checkpoint::read_whole(&path, MAX_CONFIG_BYTES).map_err(Error::storage(&path, "read"))?;
    let text = String::from_utf8(text)
        .map_err(|_| Error::config("text", format!("{} is not UTF-8", path.display())))?;
    RunConfig::read(&path.display().to_string(), &text, &[])
}

/// The first of these names that nothing in a folder has.
pub(super) fn first_free(mut names: impl Iterator<Item = String>, folder: &Path) -> String {
    names.find(|name| !folder.join(name).exists()).expect("numbers are endless")
}
