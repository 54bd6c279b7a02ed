//! The source of a file's bytes: a regular file, read by position, or the binary itself.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::WEIGHTS_STEM;
use crate::error::{Error, Result};
use crate::files::contents::{CONVERT, never_read};

/// Extensions of files that Python's pickle writes.
const PICKLES: [&str; 6] = ["pt", "pth", "bin", "ckpt", "pkl", "pickle"];

#[derive(Debug)]
pub(super) enum Source {
    /// Open for as long as it is in use: replacing the file has no effect.
    File(File),
    /// Opened for each use, and refused if it was replaced since the first one.
    OnDemand(Identity),
    /// Part of the binary.
    Embedded(&'static [u8]),
}

/// Properties of a file by which a replacement is recognized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Modification time in seconds and nanoseconds.
    modified: (i64, i64),
}

/// A source opened for reading.
pub(super) enum Opened<'s> {
    Kept(&'s File),
    ForNow(File),
    Embedded(&'static [u8]),
}

impl Source {
    /// Opens a regular file; returns its length too.
    pub fn open(path: &Path) -> Result<(Self, u64)> {
        refuse_pickle(path)?;
        // Checked before opening: opening a FIFO would block, and opening a device may have side
        // effects.
        let found = fs::metadata(path).map_err(|e| open_error(path, e))?;
        if !found.is_file() {
            return Err(Error::data(
                path,
                if found.is_dir() { "is a folder, not a file" } else { "is not a regular file" },
            ));
        }
        let file = File::open(path).map_err(|e| open_error(path, e))?;
        let bytes = file.metadata().map_err(Error::storage(path, "inspect"))?.len();
        Ok((Source::File(file), bytes))
    }

    /// Returns the same file, without a descriptor between uses.
    pub fn on_demand(self, path: &Path) -> Result<Self> {
        match self {
            Source::File(file) => {
                let found = file.metadata().map_err(Error::storage(path, "inspect"))?;
                Ok(Source::OnDemand(Identity::from_metadata(&found)))
            }
            other => Ok(other),
        }
    }

    /// Opens the bytes of the file at `path`, as they were when it was first opened.
    ///
    /// # Errors
    /// [`Error::Data`] if the path now has another file, or none.
    pub fn opened(&self, path: &Path) -> Result<Opened<'_>> {
        match self {
            Source::File(file) => Ok(Opened::Kept(file)),
            Source::OnDemand(identity) => identity.reopened(path).map(Opened::ForNow),
            Source::Embedded(bytes) => Ok(Opened::Embedded(bytes)),
        }
    }
}

impl Identity {
    fn from_metadata(file: &Metadata) -> Self {
        Identity {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
        }
    }

    fn reopened(self, path: &Path) -> Result<File> {
        let replaced = |what: &str| {
            Error::data(
                path,
                format!("was replaced while the run used it: {what}; put it back, or start again"),
            )
        };
        // Checked before opening: the path may now be a FIFO, whose opening would block.
        let found = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(replaced("it is not there any more"));
            }
            found => found.map_err(Error::storage(path, "inspect"))?,
        };
        if !found.is_file() {
            return Err(replaced("it is not a regular file any more"));
        }
        let file = File::open(path).map_err(Error::storage(path, "open"))?;
        let now =
            Identity::from_metadata(&file.metadata().map_err(Error::storage(path, "inspect"))?);
        match now {
            now if now == self => Ok(file),
            now if (now.device, now.inode) != (self.device, self.inode) => {
                Err(replaced("another file stands in its place"))
            }
            now if now.bytes != self.bytes => {
                Err(replaced(&format!("it had {} bytes and has {} now", self.bytes, now.bytes)))
            }
            _ => Err(replaced("it was written to")),
        }
    }
}

impl Opened<'_> {
    /// Fills `buffer` from byte `start`.
    pub fn read_at(&self, buffer: &mut [u8], start: u64) -> io::Result<()> {
        match self {
            Opened::Kept(file) => file.read_exact_at(buffer, start),
            Opened::ForNow(file) => file.read_exact_at(buffer, start),
            Opened::Embedded(bytes) => {
                buffer.copy_from_slice(&bytes[start as usize..][..buffer.len()]);
                Ok(())
            }
        }
    }
}

/// Refuses files that could run code, by their extension.
///
/// # Errors
/// [`Error::Data`] with a command that converts the file.
fn refuse_pickle(path: &Path) -> Result<()> {
    refuse(path, false)
}

/// As `refuse_pickle`, where samples are expected: the error names the importer of caches.
///
/// # Errors
/// [`Error::Data`].
pub fn refuse_pickled_data(path: &Path) -> Result<()> {
    refuse(path, true)
}

fn refuse(path: &Path, of_data: bool) -> Result<()> {
    match is_pickle(path) {
        true => Err(Error::data(path, format!("is a pickle, {}", never_read(of_data)))),
        false => Ok(()),
    }
}

/// Refuses weights and checkpoints that are pickles: such a file, or a folder that contains such
/// files and no safetensors.
///
/// # Errors
/// [`Error::CheckpointMismatch`] with a command that converts them.
pub fn refuse_pickled_weights(path: &Path) -> Result<()> {
    let place = format!(
        "{WEIGHTS_STEM}.safetensors beside their config.json, and give that folder as model.path"
    );
    refuse_weights(path, &place)
}

/// As [`refuse_pickled_weights`], for a folder whose weights belong into `<stem>.safetensors`.
///
/// # Errors
/// As [`refuse_pickled_weights`].
pub fn refuse_pickles_beside(folder: &Path, stem: &str) -> Result<()> {
    refuse_weights(folder, &format!("{stem}.safetensors beside their config.json"))
}

/// `place`: where converted weights belong.
fn refuse_weights(path: &Path, place: &str) -> Result<()> {
    let inside: Vec<PathBuf> =
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    let is_safe = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "safetensors");
    let found = if is_pickle(path) {
        Some(path)
    } else {
        inside.iter().find(|path| is_pickle(path)).map(PathBuf::as_path)
    };
    match found {
        Some(pickle) if !inside.iter().any(is_safe) => {
            let what = format!(
                "is a pickle, which can run code when it is opened and is never read; convert the weights once, to {place}: {CONVERT}"
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

/// Converts an error of opening data, for `map_err`: a missing file and a circle of links are
/// errors of the data, any other one of the storage.
pub(crate) fn open_error(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::data(path, "does not exist"),
        _ if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            Error::data(path, "is a link that leads to itself")
        }
        _ => Error::storage(path, "open")(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(source: &Source, path: &Path) -> Result<String> {
        let mut bytes = [0; 3];
        source.opened(path)?.read_at(&mut bytes, 1).expect("four bytes");
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    #[test]
    fn a_file_that_is_kept_open_is_the_same_whatever_takes_its_place() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, other) = (folder.path().join("a"), folder.path().join("b"));
        fs::write(&path, "zero").and_then(|()| fs::write(&other, "null")).expect("two files");
        let (source, _) = Source::open(&path).expect("a file");
        fs::rename(&other, &path).expect("a rename");
        assert_eq!(read(&source, &path).expect("still open"), "ero");
    }

    #[test]
    fn a_file_that_is_opened_on_demand_is_refused_once_it_is_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, other) = (folder.path().join("a"), folder.path().join("b"));
        let begun = || {
            fs::write(&path, "zero").expect("a file");
            let (source, _) = Source::open(&path).expect("a file");
            let source = source.on_demand(&path).expect("its marks");
            assert_eq!(read(&source, &path).expect("untouched"), "ero");
            source
        };
        let refused = |source: &Source, what: &str| {
            let error = read(source, &path).expect_err("another file");
            assert_eq!(error.exit_code(), 40);
            assert!(
                error
                    .to_string()
                    .contains(&format!("a: was replaced while the run used it: {what}")),
                "{error}"
            );
        };
        let source = begun();
        fs::write(&other, "null").and_then(|()| fs::rename(&other, &path)).expect("a rename");
        refused(&source, "another file stands in its place");
        let source = begun();
        fs::write(&path, "zero and more").expect("a longer file");
        refused(&source, "it had 4 bytes and has 13 now");
        let source = begun();
        let later = fs::metadata(&path).and_then(|found| found.modified()).expect("a time")
            + std::time::Duration::from_nanos(1000);
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(later))
            .expect("another time");
        refused(&source, "it was written to");
        let source = begun();
        fs::remove_file(&path).expect("no file");
        refused(&source, "it is not there any more");
        fs::create_dir(&path).expect("a folder in its place");
        refused(&source, "it is not a regular file any more");
    }

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
            error.to_string().contains("model.bin: is a pickle")
                && error.to_string().contains("safetensors.torch.save_file"),
            "{error}"
        );
        assert_eq!(
            refuse_pickled_weights(&path.join("model.PT")).expect_err("by its name").exit_code(),
            51
        );
        fs::write(path.join("model.safetensors"), "").expect("a file");
        refuse_pickled_weights(path).expect("there is something to read");
    }
}
