//! Resolves paths on the command line; each names a run folder, or a checkpoint in one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::run::checkpoint::{self, Manifest};

/// Returns the run folder and the checkpoint that a path names: the path itself, or the newest
/// checkpoint in it.
///
/// # Errors
/// [`Error::NoCheckpoint`], [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn locate(path: &Path) -> Result<(PathBuf, PathBuf)> {
    locate_manifest(path).map(|(run, checkpoint, _)| (run, checkpoint))
}

/// As [`locate`], with the checkpoint's manifest.
///
/// # Errors
/// As [`locate`].
pub fn locate_manifest(path: &Path) -> Result<(PathBuf, PathBuf, Manifest)> {
    if checkpoint::is_checkpoint(path) {
        let manifest = checkpoint::verify(path).map_err(|unfit| unfit.into_error(path))?;
        return Ok((run_of(path)?.0, path.into(), manifest));
    }
    loop {
        let (_, folder) = checkpoints_of(path)?
            .into_iter()
            .next_back()
            .ok_or_else(|| no_checkpoint(path, "holds no checkpoint"))?;
        match checkpoint::verify(&folder) {
            Ok(manifest) => return Ok((path.into(), folder, manifest)),
            // A live run has deleted the checkpoint for a newer one meanwhile.
            Err(_) if !folder.exists() => {}
            // A broken newest checkpoint is an error: samples of an older one would be taken for
            // the run's.
            Err(unfit) => return Err(unfit.into_error(&folder)),
        }
    }
}

/// Returns the checkpoints of a run folder by step, ascending.
///
/// # Errors
/// [`Error::NoCheckpoint`] if it is not a folder; [`Error::Storage`].
pub fn checkpoints_of(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    match (run.exists(), run.is_dir()) {
        (_, true) => checkpoint::list(run),
        (true, false) => Err(no_checkpoint(run, "is a file; a run or a checkpoint is a folder")),
        (false, false) => Err(no_checkpoint(run, "there is no such folder")),
    }
}

/// Returns [`Error::NoCheckpoint`] for this path.
pub fn no_checkpoint(path: &Path, what: impl Into<String>) -> Error {
    Error::NoCheckpoint { path: path.into(), what: what.into() }
}

/// Returns the run folder that contains a checkpoint, and the checkpoint, both canonical: `.` and
/// links may name any folder.
///
/// # Errors
/// [`Error::Storage`].
pub fn run_of(checkpoint: &Path) -> Result<(PathBuf, PathBuf)> {
    let checkpoint = fs::canonicalize(checkpoint).map_err(Error::storage(checkpoint, "find"))?;
    Ok((checkpoint.parent().unwrap_or(&checkpoint).into(), checkpoint))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_run_of_a_checkpoint_is_the_folder_above_it_through_links_and_dots() {
        let root = tempfile::tempdir().unwrap();
        let run = fs::canonicalize(root.path()).unwrap();
        let step = run.join(checkpoint::folder_name(3));
        fs::create_dir(&step).unwrap();
        symlink(&step, run.join("best")).unwrap();
        for path in [step.clone(), step.join("."), step.join("../step-00000003"), run.join("best")]
        {
            assert_eq!(run_of(&path).unwrap(), (run.clone(), step.clone()), "{}", path.display());
        }
    }
}
