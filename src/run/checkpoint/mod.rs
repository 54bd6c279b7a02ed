//! Checkpoints: every rank writes files, a manifest lists them, and a rename commits them.
//!
//! Frozen parameters are not saved: the manifest names what they are. Averaged weights have files
//! of their own. With sharded state, each stage is gathered on the rank that writes it, so that the
//! files have the same bytes under any sharding.
//!
//! A checkpoint is valid if its manifest is unchanged and every file has the size and hash that the
//! manifest records. Files hold parameters by name, not by rank, so that any world size loads the
//! checkpoint of any other. Equal state gives equal bytes: a checkpoint contains no time, no host
//! name and no number of ranks.
//!
//! A checkpoint of a step with a validation holds its loss beside, see `best.rs`.
//!
//! Order of a save: copy the state; write, hash and fsync the files in a hidden folder; agree among
//! all ranks; write and fsync the manifest; fsync the folder; rename it; fsync its parent. Only
//! then is the checkpoint reported as saved and older ones are deleted. A crash or a power cut
//! before the rename leaves the previous checkpoint. Everything after the copy runs concurrently
//! with the steps.

pub mod best;
mod commit;
mod load;
mod saver;
mod snapshot;
#[cfg(test)]
mod tests;
mod verify;

pub use best::Judged;
pub use commit::{clear_leftovers, copy_to, withdraw};
pub use load::{base_of, has_averages, load, load_parameters, open_parameters, recorded, step_of};
pub use saver::Saver;
pub use snapshot::{Saved, copied_bytes, saved_bytes};
pub use verify::{Unfit, read_whole, verify};

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::RunConfig;
use crate::data::OnSmallGroup;
use crate::error::{Error, Result};
use crate::files::sha256::hex;
use crate::run::changes::{self, Values};
use crate::run::frozen_base::Base;
use crate::run::guard::Guard;
use crate::settings::Choice;

const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "fm-dist checkpoint";
const VERSION: u64 = 3;
/// Format version whose parameters can be read, but which lacks what a resume needs.
const VERSION_WITHOUT_RECORD: u64 = 2;

/// The manifest: everything that a resume needs besides tensors.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u64,
    /// Number of optimizer steps done.
    pub step: u64,
    pub samples_seen: u64,
    pub seed: u64,
    pub global_batch_size: u64,
    pub guard: Guard,
    /// Learning rate of the newest step that was not skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// The recorded configuration, see [`changes::recorded`]; `None` in version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config: Option<Values>,
    /// Fingerprint of the dataset, see [`Dataset::fingerprint`](crate::data::Dataset::fingerprint).
    pub data: String,
    /// The word of `data.on_small_group` if groups are smaller than the global batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    small_groups: Option<String>,
    /// Identity of the frozen parameters; `None` if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// Number of the update after which the averages of the weights began; `None` without averages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub averages_began: Option<u64>,
    parts: Vec<SavedFile>,
    /// Hash of this manifest's text with this field empty, so that a flipped bit in a number is
    /// detected.
    sha256: String,
}

/// The differences from the run of a checkpoint with which a resume goes on, as the user allows it.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllowedChanges {
    /// Other data.
    pub data: bool,
    /// Another global batch.
    pub batch: bool,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SavedFile {
    file: String,
    bytes: u64,
    sha256: String,
}

impl Manifest {
    /// Returns the manifest of a run before its first step.
    pub fn new(config: &RunConfig, global_batch_size: u64, data: String) -> Self {
        Manifest {
            format: FORMAT.into(),
            version: VERSION,
            step: 0,
            samples_seen: 0,
            seed: config.seed,
            global_batch_size,
            guard: Guard::default(),
            lr: None,
            config: Some(changes::recorded(config)),
            data,
            small_groups: None,
            base: None,
            averages_began: config.ema.is_on().then_some(0),
            parts: Vec::new(),
            sha256: String::new(),
        }
    }

    /// The same, with frozen parameters.
    pub fn on_base(self, base: Option<Base>) -> Self {
        Manifest { base, ..self }
    }

    /// The same, for an order of samples that does this with groups smaller than the global batch.
    pub fn with_small_groups(self, rule: Option<OnSmallGroup>) -> Self {
        Manifest { small_groups: rule.map(|rule| rule.word().into()), ..self }
    }

    /// Returns the reason why steps would see other samples than the checkpoint's run, though not
    /// for another global batch.
    fn other_data(
        &self,
        config: &RunConfig,
        record: &Values,
        configured: &Manifest,
    ) -> Option<String> {
        let fingerprint = pair("data fingerprint", &self.data, &configured.data);
        let share = fingerprint.as_ref().and_then(|_| changes::other_share(record, config));
        let small_groups = match (&self.small_groups, &configured.small_groups) {
            (Some(was), Some(now)) => pair("data.on_small_group", was, now),
            _ => None,
        };
        let texts: Vec<String> = [share, fingerprint, small_groups].into_iter().flatten().collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    /// Returns the reason why parameters that were trained on one base are not those of another.
    fn other_base(&self, base: Option<&Base>) -> Option<String> {
        let shown = |base: Option<&Base>| base.map_or("all trained".into(), Base::to_string);
        let fingerprint = |base: Option<&Base>| base.map(|base| base.fingerprint.clone());
        (fingerprint(self.base.as_ref()) != fingerprint(base)).then(|| {
            let (now, was) = (shown(base), shown(self.base.as_ref()));
            format!("the frozen parameters are {now}, the checkpoint's were {was}")
        })
    }

    /// Returns the manifest's file text, with the hash filled in.
    fn sealed(mut self) -> String {
        self.sha256 = self.digest();
        self.text()
    }

    fn digest(&self) -> String {
        hex(Sha256::new_with_prefix(Manifest { sha256: String::new(), ..self.clone() }.text()))
    }

    fn text(&self) -> String {
        serde_json::to_string_pretty(self).expect("a manifest is JSON") + "\n"
    }

    /// Refuses a resume where the same step would see other samples or other draws, or where the
    /// same parameters would be another function. Returns a line about each change that is allowed.
    fn check_same_run(
        &self,
        path: &Path,
        config: &RunConfig,
        configured: &Manifest,
        allowed: AllowedChanges,
    ) -> Result<Vec<String>> {
        let Some(record) = &self.config else {
            let what = format!(
                "is of version {}, which records no configuration, so that it is not certain to go on as it was; \
                 resume it with the fm-dist that saved it, or export it and begin a run with model.path",
                self.version
            );
            return Err(Error::checkpoint_mismatch(path, what));
        };
        let seed = pair("seed", &self.seed, &configured.seed);
        let data = self.other_data(config, record, configured);
        let batch = pair("global batch", &self.global_batch_size, &configured.global_batch_size);
        let refused = |text: Option<String>, option: &str, goes_on: &str| {
            text.map(|text| format!("{text} ({option} goes on {goes_on})"))
        };
        let differing = [
            seed,
            refused(
                batch.clone().filter(|_| !allowed.batch),
                "--allow-batch-change",
                "after the samples that were seen",
            ),
            refused(
                data.clone().filter(|_| !allowed.data),
                "--allow-data-change",
                "with other data",
            ),
            changes::other_architecture(record, config),
            self.other_base(configured.base.as_ref()),
        ];
        let texts: Vec<String> = differing.into_iter().flatten().collect();
        if !texts.is_empty() {
            return Err(Error::checkpoint_mismatch(path, texts.join("; ")));
        }
        let data = data.map(|text| format!("{text}; going on with other data, as was asked"));
        let batch = batch.map(|text| {
            format!(
                "{text}; going on after the {} samples that were seen, as was asked",
                self.samples_seen
            )
        });
        Ok(batch.into_iter().chain(data).collect())
    }
}

/// Describes what a checkpoint has saved and what is configured, if they differ.
fn pair<T: Display + PartialEq>(name: &str, saved: &T, now: &T) -> Option<String> {
    (saved != now).then(|| format!("{name} is {now}, the checkpoint's was {saved}"))
}

/// The weights that a checkpoint holds for every trained parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedWeights {
    /// Those of its step.
    Trained,
    /// Their exponential moving averages.
    Averaged,
}

impl SavedWeights {
    /// Returns the averages if they are asked for.
    pub fn averaged_if(asked: bool) -> Self {
        if asked { SavedWeights::Averaged } else { SavedWeights::Trained }
    }
}

/// `step-00000200`.
pub fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Returns the modification time of a checkpoint's manifest; `None` if it has none.
pub fn written(folder: &Path) -> Option<SystemTime> {
    fs::metadata(folder.join(MANIFEST)).and_then(|found| found.modified()).ok()
}

/// True if a folder contains a manifest.
pub fn is_checkpoint(folder: &Path) -> bool {
    folder.join(MANIFEST).exists()
}

/// Returns the committed checkpoints of a run by step, ascending, without verifying them.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = fs::read_dir(run).map_err(Error::storage(run, "list"))?;
    let step_of =
        |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| Some((step_of(&entry.path())?, entry.path())))
        .collect();
    found.sort();
    Ok(found)
}
