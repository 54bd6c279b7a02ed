//! Where a file's bytes come from: a regular file, read by position, or the binary itself.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

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
            return Err(Error::data(path, "is not a regular file"));
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
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase());
    if ending.is_some_and(|ending| PICKLES.contains(&ending.as_str())) {
        let what = "is a pickle, which can run code when it is opened and is never read; convert it once in Python with \
                    safetensors.torch.save_file(torch.load(path, weights_only=True), \"data.safetensors\")";
        return Err(Error::data(path, what));
    }
    Ok(())
}

/// For `map_err` where data are opened: what is missing is the data's fault, all else the storage's.
pub(in crate::data) fn open_error(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::data(path, "does not exist"),
        _ => Error::storage(path, "open")(error),
    }
}
