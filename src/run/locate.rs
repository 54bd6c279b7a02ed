//! Paths on the command line: each means a run folder, or a checkpoint in one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::run::checkpoint;

/// The run folder and the checkpoint that a path means: itself, or its newest.
///
/// # Errors
/// [`Error::NoCheckpoint`], [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn locate(path: &Path) -> Result<(PathBuf, PathBuf)> {
    if checkpoint::is_checkpoint(path) {
        checkpoint::verify(path).map_err(|unfit| unfit.into_error(path))?;
        return Ok((run_of(path)?.0, path.into()));
    }
    loop {
        let (_, folder) = checkpoints_of(path)?
            .into_iter()
            .next_back()
            .ok_or_else(|| no_checkpoint(path, "holds no checkpoint"))?;
        match checkpoint::verify(&folder) {
            Ok(_) => return Ok((path.into(), folder)),
            // A run that goes on has deleted it for a newer one meanwhile.
            Err(_) if !folder.exists() => {}
            // A newest one that is broken is an error: samples of an older one would pass for the
            // run's.
            Err(unfit) => return Err(unfit.into_error(&folder)),
        }
    }
}

/// The checkpoints of a run folder by step, ascending.
///
/// # Errors
/// [`Error::NoCheckpoint`] if it is no folder; [`Error::Storage`].
pub fn checkpoints_of(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    match (run.exists(), run.is_dir()) {
        (_, true) => checkpoint::list(run),
        (true, false) => Err(no_checkpoint(run, "is a file; a run or a checkpoint is a folder")),
        (false, false) => Err(no_checkpoint(run, "there is no such folder")),
    }
}

/// [`Error::NoCheckpoint`] of this path.
pub fn no_checkpoint(path: &Path, what: impl Into<String>) -> Error {
    Error::NoCheckpoint { path: path.into(), what: what.into() }
}

/// The run that a checkpoint's folder lies in, and the checkpoint, both by their true names: `.`
/// and links may mean any folder.
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
