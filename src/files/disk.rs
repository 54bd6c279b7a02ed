//! The only writer of whole files: each call can fail, and each failure is reported with the
//! system's message. Injected faults of checkpoints act here.

use std::fs::{self, File};
use std::io::{self, BufWriter, IntoInnerError, Write};
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::fault;
use crate::phase::Phase;

/// A call to the file system.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FileOperation {
    CreateFolder,
    Create,
    Write,
    Sync,
    SyncFolder,
    Rename,
    Link,
    Delete,
}

/// The disk as used by one writer.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Step and phase of the checkpoint that is being saved, the target of injected faults.
    saving: Option<(u64, Phase)>,
}

impl Disk {
    /// For files that belong to no checkpoint.
    pub const PLAIN: Disk = Disk { saving: None };

    /// Returns the disk for one phase of saving the checkpoint of `step`.
    pub fn saving(step: u64, phase: Phase) -> Self {
        Disk { saving: Some((step, phase)) }
    }

    /// Creates a file, writes it by `fill` and fsyncs it. `bytes`: its size, if known; that space
    /// is reserved before the first byte is written.
    ///
    /// # Errors
    /// [`Error::Storage`], also if the file exists.
    pub fn write_file(
        self,
        path: &Path,
        bytes: Option<u64>,
        fill: impl FnOnce(&mut BufWriter<Output<'_>>) -> io::Result<()>,
    ) -> Result<()> {
        let mut buffered = BufWriter::new(self.create(path, bytes)?);
        let filled = fill(&mut buffered)
            .and_then(|()| buffered.into_inner().map_err(IntoInnerError::into_error));
        filled.map_err(|error| storage(path, "write", bytes, error))?.sync()
    }

    pub fn create_folder(self, path: &Path) -> Result<()> {
        self.before(FileOperation::CreateFolder, path)
            .and_then(|()| fs::create_dir(path))
            .map_err(Error::storage(path, "create"))
    }

    /// Creates a file for writing and syncing; see [`write_file`](Self::write_file).
    fn create(self, path: &Path, bytes: Option<u64>) -> Result<Output<'_>> {
        let created = self
            .before(FileOperation::Create, path)
            .and_then(|()| File::create_new(path))
            .map_err(Error::storage(path, "create"))?;
        if let Some(bytes) = bytes {
            reserve(&created, bytes)
                .map_err(|error| storage(path, "reserve room for", Some(bytes), error))?;
        }
        Ok(Output { disk: self, file: created, path, bytes })
    }

    pub fn sync_folder(self, path: &Path) -> Result<()> {
        let synced = self
            .before(FileOperation::SyncFolder, path)
            .and_then(|()| File::open(path))
            .and_then(|folder| folder.sync_all());
        synced.map_err(Error::storage(path, "sync"))
    }

    pub fn rename(self, from: &Path, to: &Path) -> Result<()> {
        self.before(FileOperation::Rename, to)
            .and_then(|()| fs::rename(from, to))
            .map_err(Error::storage(to, "rename to"))
    }

    /// Makes the link `path` lead to `target`, whatever it led to, so that a reader finds the one
    /// or the other. `scratch`: a path beside it, which is overwritten.
    pub fn link(self, target: &Path, path: &Path, scratch: &Path) -> Result<()> {
        let linked = self.before(FileOperation::Link, path).and_then(|()| {
            match fs::remove_file(scratch) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => symlink(target, scratch)?,
            }
            fs::rename(scratch, path)
        });
        linked.map_err(Error::storage(path, "link"))
    }

    /// Deletes a folder and its contents.
    pub fn delete(self, path: &Path) -> Result<()> {
        self.before(FileOperation::Delete, path)
            .and_then(|()| fs::remove_dir_all(path))
            .map_err(Error::storage(path, "delete"))
    }

    fn before(self, operation: FileOperation, path: &Path) -> io::Result<()> {
        #[cfg(test)]
        tests::note(operation, path)?;
        tracing::trace!("{operation:?} {}", path.display());
        let Some((step, phase)) = self.saving else { return Ok(()) };
        let phase = match (operation, phase) {
            (FileOperation::Sync, Phase::Write) => Phase::Sync,
            (_, phase) => phase,
        };
        // A fault that strikes before anything exists would leave nothing to clean up.
        if !matches!(operation, FileOperation::CreateFolder | FileOperation::Create) {
            fault::strike_at(phase, step);
        }
        fault::io(phase, step)
    }
}

/// A file being written. Every write and the final fsync may fail as the disk does; the caller's
/// `write_all` continues after a short write.
pub struct Output<'p> {
    disk: Disk,
    file: File,
    path: &'p Path,
    bytes: Option<u64>,
}

impl Output<'_> {
    /// Fsyncs all that was written. After that, closing the file has no error left to report.
    pub fn sync(self) -> Result<()> {
        let synced =
            self.disk.before(FileOperation::Sync, self.path).and_then(|()| self.file.sync_all());
        synced.map_err(|error| storage(self.path, "sync", self.bytes, error))
    }
}

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.disk.before(FileOperation::Write, self.path)?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Reserves the space and keeps the length, so that a truncated file is recognizable by its length.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    loop {
        return match fallocate(file, FallocateFlags::KEEP_SIZE, 0, bytes.max(1)) {
            Err(Errno::INTR) => continue,
            // A file system that cannot reserve space reports a full disk when it writes.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => other.map_err(io::Error::from),
        };
    }
}

/// Returns the system's message, followed by the bytes needed and the bytes free if the disk is
/// full.
pub fn storage(
    path: &Path,
    operation: &'static str,
    needed: Option<u64>,
    error: io::Error,
) -> Error {
    let full = matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    );
    let explained = match (free_bytes(path), needed) {
        (Some(free), Some(needed)) if full => io::Error::new(
            error.kind(),
            format!("{error}; it needs {needed} bytes, the disk has {free} free"),
        ),
        _ => error,
    };
    Error::storage(path, operation)(explained)
}

fn free_bytes(path: &Path) -> Option<u64> {
    let found = statvfs(path.parent()?).ok()?;
    Some(found.f_bavail * found.f_frsize)
}

#[cfg(test)]
pub mod tests {
    use std::cell::RefCell;
    use std::path::PathBuf;

    use super::*;

    /// Disk operations of this thread, and the number of them after which the disk fails for good.
    #[derive(Default)]
    struct Journal {
        calls: Vec<(FileOperation, PathBuf)>,
        fails_after: usize,
    }

    thread_local!(static JOURNAL: RefCell<Option<Journal>> = const { RefCell::new(None) });

    pub fn note(operation: FileOperation, path: &Path) -> io::Result<()> {
        JOURNAL.with_borrow_mut(|journal| {
            let Some(journal) = journal else { return Ok(()) };
            if journal.calls.len() == journal.fails_after {
                return Err(Errno::IO.into());
            }
            journal.calls.push((operation, path.into()));
            Ok(())
        })
    }

    /// Runs `act` with a disk that fails after this many calls. Returns the calls that succeeded.
    pub fn on_a_disk_that_fails_after<T>(
        calls: usize,
        act: impl FnOnce() -> T,
    ) -> (T, Vec<(FileOperation, PathBuf)>) {
        JOURNAL.set(Some(Journal { calls: Vec::new(), fails_after: calls }));
        let outcome = act();
        let journal = JOURNAL.take().expect("it was set above");
        (outcome, journal.calls)
    }

    #[test]
    fn a_disk_without_room_is_told_with_numbers() {
        let text =
            storage(Path::new("/tmp/part"), "write", Some(4096), Errno::NOSPC.into()).to_string();
        assert!(
            text.starts_with("cannot write /tmp/part: No space left on device (os error 28); it needs 4096 bytes, the disk has "),
            "{text}"
        );
        assert!(
            storage(Path::new("/tmp/part"), "write", Some(1), Errno::DQUOT.into())
                .to_string()
                .contains("quota exceeded (os error 122); it needs")
        );
        let text = storage(Path::new("/tmp/part"), "sync", Some(1), Errno::IO.into()).to_string();
        assert_eq!(text, "cannot sync /tmp/part: Input/output error (os error 5)");
    }

    #[test]
    fn room_is_asked_for_without_changing_the_length() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("part");
        let output = Disk::saving(1, Phase::Write).create(&path, Some(1 << 16)).expect("room");
        assert_eq!(output.file.metadata().expect("a file").len(), 0);
        // More than any disk has.
        let error = Disk::saving(1, Phase::Write)
            .create(&folder.path().join("giant"), Some(1 << 60))
            .map(drop)
            .expect_err("no room");
        assert_eq!(error.exit_code(), 30);
    }
}
