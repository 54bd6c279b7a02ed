//! What makes parts a checkpoint, and what becomes of old ones. Rank 0 does it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{MANIFEST, Manifest, SavedFile, folder_name, list};
use crate::config::CheckpointSettings;
use crate::error::{Error, Result};
use crate::files::disk::Disk;
use crate::phase::Phase;

/// Where the parts of a checkpoint are written: hidden from whoever looks for checkpoints.
pub fn staged(run: &Path, step: u64) -> PathBuf {
    run.join(format!(".{}.tmp", folder_name(step)))
}

/// Where a checkpoint waits to be deleted.
fn unwanted(run: &Path, step: u64) -> PathBuf {
    run.join(format!(".{}.old", folder_name(step)))
}

/// A fresh folder for the parts of `step`.
///
/// # Errors
/// [`Error::Storage`]; also where the step has a checkpoint already.
pub fn prepare(run: &Path, step: u64) -> Result<()> {
    let (target, staged) = (run.join(folder_name(step)), staged(run, step));
    if target.exists() {
        let exists = io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a committed checkpoint is never written over",
        );
        return Err(Error::Storage { path: target, operation: "create", source: exists });
    }
    Disk::saving(step, Phase::Write).create_folder(&staged)
}

/// Makes the parts in the staged folder the run's checkpoint of `manifest.step`.
///
/// # Errors
/// [`Error::Storage`]; until the rename nobody sees anything of it.
pub fn commit(run: &Path, manifest: &Manifest, mut parts: Vec<SavedFile>) -> Result<()> {
    let (step, disk) = (manifest.step, Disk::saving(manifest.step, Phase::Commit));
    let (staged, target) = (staged(run, step), run.join(folder_name(step)));
    parts.sort_by(|a, b| a.file.cmp(&b.file));
    let text = Manifest { parts, ..manifest.clone() }.sealed();
    let path = staged.join(MANIFEST);
    let bytes = Some(text.len() as u64);
    disk.write_file(&path, bytes, |file| file.write_all(text.as_bytes()))?;
    disk.sync_folder(&staged)?;
    disk.rename(&staged, &target)?;
    disk.sync_folder(run)
}

/// Deletes the checkpoints that the settings do not keep, oldest first, once that of `step` is
/// safe. Each goes by one rename before its files do, so that whoever reads meanwhile finds a whole
/// checkpoint or none.
///
/// # Errors
/// [`Error::Storage`].
pub fn prune(run: &Path, step: u64, settings: &CheckpointSettings) -> Result<()> {
    let disk = Disk::saving(step, Phase::Prune);
    let kept_for_ever =
        |step: u64| settings.keep_every.is_some_and(|every| step.is_multiple_of(every));
    let mut old = list(run)?;
    old.truncate(old.len().saturating_sub(settings.keep_last as usize));
    for (step, path) in old.into_iter().filter(|(step, _)| !kept_for_ever(*step)) {
        let unwanted = unwanted(run, step);
        disk.rename(&path, &unwanted)?;
        disk.delete(&unwanted)?;
    }
    Ok(())
}

/// Removes what a save or a deletion left that did not come to its end. Only for a run folder that
/// nobody else writes to.
///
/// # Errors
/// [`Error::Storage`].
pub fn clear_leftovers(run: &Path) -> Result<()> {
    let left = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let name = name.strip_suffix(".tmp").or_else(|| name.strip_suffix(".old"))?;
        name.strip_prefix(".step-")?.parse::<u64>().ok()
    };
    let entries = fs::read_dir(run).map_err(Error::storage(run, "list"))?;
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| left(path).is_some()) {
        fs::remove_dir_all(&path).map_err(Error::storage(&path, "clear"))?;
    }
    Ok(())
}
