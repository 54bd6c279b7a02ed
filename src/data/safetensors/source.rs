//! Where a file's bytes come from: a regular file, read by position, or the binary itself.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::data::contents::CONVERT;
use crate::error::{Error, Result};

/// Endings of files that Python's pickle wrote.
const PICKLES: [&str; 6] = ["pt", "pth", "bin", "ckpt", "pkl", "pickle"];

#[derive(Debug)]
pub(super) enum Source {
    File(File),
    /// Part of the binary.
    Embedded(&'static [u8]),
}

impl Source {
    /// A regular file and its length.
    pub fn open(path: &Path) -> Result<(Self, u64)> {
        refuse_pickle(path)?;
        // Asked before opening: to open a FIFO blocks, and to open a device may do anything.
        let found = fs::metadata(path).map_err(|e| open_error(path, e))?;
        if !found.is_file() {
            return Err(Error::data(path, if found.is_dir() { "is a folder, not a file" } else { "is not a regular file" }));
        }
        let file = File::open(path).map_err(|e| open_error(path, e))?;
        let bytes = file.metadata().map_err(Error::storage(path, "inspect"))?.len();
        Ok((Source::File(file), bytes))
    }

    /// Fills `buffer` from byte `start` on.
    pub fn read_at(&self, buffer: &mut [u8], start: u64) -> io::Result<()> {
        match self {
            Source::File(file) => file.read_exact_at(buffer, start),
            Source::Embedded(bytes) => {
                buffer.copy_from_slice(&bytes[start as usize..][..buffer.len()]);
                Ok(())
            }
        }
    }
}

/// Refuses files that could run code, by their ending.
///
/// # Errors
/// [`Error::Data`] with the way to convert the file.
pub fn refuse_pickle(path: &Path) -> Result<()> {
    if is_pickle(path) {
        let what = format!("is a pickle, which can run code when it is opened and is never read; convert it once: {CONVERT}");
        return Err(Error::data(path, what));
    }
    Ok(())
}

/// Refuses weights and checkpoints that are pickles: such a file, or a folder that holds such files and no safetensors.
///
/// # Errors
/// [`Error::CheckpointMismatch`] with the way to convert them.
pub fn refuse_pickled_weights(path: &Path) -> Result<()> {
    let inside: Vec<PathBuf> = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    let is_safe = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "safetensors");
    let found = if is_pickle(path) { Some(path) } else { inside.iter().find(|path| is_pickle(path)).map(PathBuf::as_path) };
    match found {
        Some(pickle) if !inside.iter().any(is_safe) => {
            let what = format!(
                "is a pickle, which can run code when it is opened and is never read; convert the weights once, to \
                 diffusion_pytorch_model.safetensors beside their config.json, and give that folder as model.path: {CONVERT}"
            );
            Err(Error::checkpoint_mismatch(pickle, what))
        }
        _ => Ok(()),
    }
}

fn is_pickle(path: &Path) -> bool {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase());
    ending.is_some_and(|ending| PICKLES.contains(&ending.as_str()))
}

/// For `map_err` where data are opened: what is missing is the data's fault, all else the storage's.
pub(in crate::data) fn open_error(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::data(path, "does not exist"),
        _ => Error::storage(path, "open")(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_pickles_alone_is_refused_and_one_beside_safetensors_is_not_looked_at() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path();
        refuse_pickled_weights(path).expect("nothing in it");
        fs::write(path.join("config.json"), "{}").expect("a file");
        fs::write(path.join("model.bin"), "").expect("a file");
        let error = refuse_pickled_weights(path).expect_err("a pickle alone");
        assert_eq!(error.exit_code(), 51);
        assert!(
            error.to_string().contains("model.bin: is a pickle") && error.to_string().contains("safetensors.torch.save_file"),
            "{error}"
        );
        assert_eq!(refuse_pickled_weights(&path.join("model.PT")).expect_err("by its name").exit_code(), 51);
        fs::write(path.join("model.safetensors"), "").expect("a file");
        refuse_pickled_weights(path).expect("there is something to read");
    }
}
