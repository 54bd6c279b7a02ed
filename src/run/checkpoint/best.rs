//! The best checkpoint: the one whose validation loss is the lowest of the run's checkpoints. The
//! link `best` in the run folder leads to it, and pruning spares it.
//!
//! Each checkpoint of a step with a validation holds the loss in a small file of its own. What is
//! best follows from these files, so that it survives whatever the run does.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{folder_name, list};
use crate::error::Result;
use crate::files::disk::Disk;
use crate::files::durable::replace_file;

/// The file in a checkpoint.
pub(super) const FILE: &str = "validation.json";
/// The link in a run folder.
pub const LINK: &str = "best";
/// Path at which the link is made.
const SCRATCH: &str = ".best.tmp";

/// The validation loss of a step.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Judged {
    pub step: u64,
    pub loss: f64,
    /// Hex digits of what it was judged by; only losses by one criterion are compared.
    pub criterion: String,
}

impl Judged {
    /// True if this is a number below every other by the same criterion.
    pub fn is_below<'j>(&self, mut others: impl Iterator<Item = &'j Judged>) -> bool {
        let is_beaten =
            |other: &Judged| other.criterion == self.criterion && other.loss <= self.loss;
        self.loss.is_finite() && !others.any(is_beaten)
    }

    pub(super) fn text(&self) -> String {
        serde_json::to_string(self).expect("texts and numbers are JSON") + "\n"
    }
}

/// Returns what a checkpoint records of its validation, if anything.
pub fn judged(checkpoint: &Path) -> Option<Judged> {
    serde_json::from_slice(&fs::read(checkpoint.join(FILE)).ok()?).ok()
}

/// Records a validation in a checkpoint that was committed without it.
///
/// # Errors
/// [`Error::Storage`](crate::error::Error::Storage).
pub fn record(checkpoint: &Path, judged: &Judged) -> Result<()> {
    replace_file(&checkpoint.join(FILE), |file| file.write_all(judged.text().as_bytes()))
}

/// Returns what the checkpoints of a run record of their validations, by step.
///
/// # Errors
/// [`Error::Storage`](crate::error::Error::Storage).
pub fn all_judged(run: &Path) -> Result<Vec<Judged>> {
    Ok(list(run)?.into_iter().filter_map(|(_, path)| judged(&path)).collect())
}

/// Returns the step of the best checkpoint by this criterion: the first one of the lowest loss.
///
/// # Errors
/// [`Error::Storage`](crate::error::Error::Storage).
pub(super) fn best_step(run: &Path, criterion: &str) -> Result<Option<u64>> {
    let judged = all_judged(run)?.into_iter();
    let comparable = judged.filter(|other| other.criterion == criterion && other.loss.is_finite());
    // The first of several that are equal.
    Ok(comparable.min_by(|a, b| a.loss.total_cmp(&b.loss)).map(|best| best.step))
}

/// Makes the link lead to the checkpoint of a step.
///
/// # Errors
/// [`Error::Storage`](crate::error::Error::Storage).
pub(super) fn link(run: &Path, step: u64, disk: Disk) -> Result<()> {
    if linked(run) == Some(step) {
        return Ok(());
    }
    let target = PathBuf::from(folder_name(step));
    disk.link(&target, &run.join(LINK), &run.join(SCRATCH))?;
    disk.sync_folder(run)
}

/// Makes the link lead to the best checkpoint by this criterion, and leaves it if there is none.
///
/// # Errors
/// [`Error::Storage`](crate::error::Error::Storage).
pub(super) fn link_best(run: &Path, criterion: &str, disk: Disk) -> Result<()> {
    best_step(run, criterion)?.map_or(Ok(()), |step| link(run, step, disk))
}

/// Returns the step of the checkpoint to which the link leads, if it leads to one.
pub fn linked(run: &Path) -> Option<u64> {
    let target = fs::read_link(run.join(LINK)).ok()?;
    let checkpoints = list(run).ok()?;
    checkpoints
        .into_iter()
        .map(|(step, _)| step)
        .find(|step| target == Path::new(&folder_name(*step)))
}
