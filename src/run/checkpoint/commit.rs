//! Commits a checkpoint's files, and deletes old checkpoints. Rank 0 does both.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{Judged, MANIFEST, Manifest, SavedFile, best, folder_name, list};
use crate::config::CheckpointSettings;
use crate::error::{Error, Result};
use crate::files::disk::Disk;
use crate::phase::Phase;
use crate::pulse;

/// A file in a checkpoint that is never deleted, whatever the settings of a later start say.
const KEEP: &str = "keep";

/// Returns the folder where a checkpoint is written; its name hides it from readers that look for
/// checkpoints.
pub fn staged(run: &Path, step: u64) -> PathBuf {
    run.join(format!(".{}.tmp", folder_name(step)))
}

/// Returns the path to which a checkpoint is renamed before its files are deleted.
fn unwanted(run: &Path, step: u64) -> PathBuf {
    run.join(format!(".{}.old", folder_name(step)))
}

/// Makes a fresh folder for the files of `step`.
///
/// # Errors
/// [`Error::Storage`]; also if the step already has a checkpoint.
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

/// Commits the staged folder as the run's checkpoint of `manifest.step`. `judged`: its validation,
/// if the step had one.
///
/// # Errors
/// [`Error::Storage`]. No reader sees the checkpoint before the rename.
pub fn commit(
    run: &Path,
    manifest: &Manifest,
    settings: &CheckpointSettings,
    judged: Option<&Judged>,
    mut parts: Vec<SavedFile>,
) -> Result<()> {
    let (step, disk) = (manifest.step, Disk::saving(manifest.step, Phase::Commit));
    let (staged, target) = (staged(run, step), run.join(folder_name(step)));
    parts.sort_by(|a, b| a.file.cmp(&b.file));
    let text = Manifest { parts, ..manifest.clone() }.sealed();
    let judged = judged.map(|judged| (best::FILE, judged.text()));
    let is_kept = settings.keep_every.is_some_and(|every| step.is_multiple_of(every));
    let keep = is_kept.then(|| (KEEP, String::new()));
    for (name, text) in judged.into_iter().chain(keep).chain([(MANIFEST, text)]) {
        let bytes = Some(text.len() as u64);
        disk.write_file(&staged.join(name), bytes, |file| file.write_all(text.as_bytes()))?;
    }
    disk.sync_folder(&staged)?;
    disk.rename(&staged, &target)?;
    disk.sync_folder(run)
}

/// Deletes a checkpoint that was copied into a run and is not what the run goes on from.
///
/// # Errors
/// [`Error::Storage`].
pub fn withdraw(checkpoint: &Path) -> Result<()> {
    Disk::PLAIN.delete(checkpoint)
}

/// Makes a checkpoint of one run the checkpoint of another. The large files are shared, since none
/// is ever changed, or copied to another file system. The manifest is copied: its time is that of
/// the checkpoint, by which the newest run is found.
///
/// # Errors
/// [`Error::Storage`]. No reader sees the checkpoint before all of it is there.
pub fn copy_to(run: &Path, checkpoint: &Path, manifest: &Manifest) -> Result<PathBuf> {
    let (staged, target) = (staged(run, manifest.step), run.join(folder_name(manifest.step)));
    Disk::PLAIN.create_folder(&staged)?;
    let copied = |from: &Path, to: &Path| {
        fs::copy(from, to)?;
        File::open(to)?.sync_all()
    };
    for part in &manifest.parts {
        pulse::still_at_work();
        let (from, to) = (checkpoint.join(&part.file), staged.join(&part.file));
        let shared = fs::hard_link(&from, &to).or_else(|_| copied(&from, &to));
        shared.map_err(Error::storage(&from, "copy"))?;
    }
    let from = checkpoint.join(MANIFEST);
    copied(&from, &staged.join(MANIFEST)).map_err(Error::storage(&from, "copy"))?;
    Disk::PLAIN.sync_folder(&staged)?;
    Disk::PLAIN.rename(&staged, &target)?;
    Disk::PLAIN.sync_folder(run)?;
    Ok(target)
}

/// Deletes the checkpoints that the settings do not keep, oldest first, once the checkpoint of
/// `step` is durable. `best`: the step of the best one, if it is known. Each folder is renamed
/// before its files are deleted, so that a concurrent reader finds a whole checkpoint or none.
///
/// # Errors
/// [`Error::Storage`].
pub fn prune(
    run: &Path,
    step: u64,
    settings: &CheckpointSettings,
    best: Option<u64>,
) -> Result<()> {
    let disk = Disk::saving(step, Phase::Prune);
    let linked = best::linked(run);
    let best = best.or(linked).filter(|_| settings.keep_best);
    let stays = |step: u64, path: &Path| {
        best == Some(step)
            || settings.keep_every.is_some_and(|every| step.is_multiple_of(every))
            || path.join(KEEP).exists()
    };
    let mut old = list(run)?;
    old.truncate(old.len().saturating_sub(settings.keep_last as usize));
    for (step, path) in old.into_iter().filter(|(step, path)| !stays(*step, path)) {
        let unwanted = unwanted(run, step);
        if linked == Some(step) {
            // It would lead to nothing.
            let link = run.join(best::LINK);
            fs::remove_file(&link).map_err(Error::storage(&link, "remove"))?;
        }
        disk.rename(&path, &unwanted)?;
        disk.delete(&unwanted)?;
    }
    Ok(())
}

/// Removes the remains of interrupted saves and deletions. The caller must be the only writer of
/// the run folder.
///
/// # Errors
/// [`Error::Storage`].
pub fn clear_leftovers(run: &Path) -> Result<()> {
    let leftover_step = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let name = name.strip_suffix(".tmp").or_else(|| name.strip_suffix(".old"))?;
        name.strip_prefix(".step-")?.parse::<u64>().ok()
    };
    let entries = fs::read_dir(run).map_err(Error::storage(run, "list"))?;
    for path in
        entries.flatten().map(|entry| entry.path()).filter(|path| leftover_step(path).is_some())
    {
        fs::remove_dir_all(&path).map_err(Error::storage(&path, "clear"))?;
    }
    Ok(())
}
