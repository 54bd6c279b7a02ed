//! Files that no reader sees half-written: lines are appended whole, documents are replaced whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::disk::Disk;

/// A file that grows by whole lines, even if the disk fails.
pub(crate) struct LineFile {
    file: File,
    length: u64,
}

impl LineFile {
    /// Opens for appending. A last line that a crash truncated is terminated, so that the next one
    /// starts on a line of its own.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
        let length = file.metadata()?.len();
        let mut lines = LineFile { length, file: file.try_clone()? };
        if length > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                lines.append("")?;
            }
        }
        Ok(lines)
    }

    /// Appends in one write. On failure the bytes already written are cut off again.
    pub fn append(&mut self, line: &str) -> io::Result<()> {
        let bytes = [line.as_bytes(), b"\n"].concat();
        let written = self.file.write_all(&bytes);
        match written {
            Ok(()) => self.length += bytes.len() as u64,
            // The first error is reported; a failing cut would add nothing.
            Err(_) => drop(self.file.set_len(self.length)),
        }
        written
    }

    /// Returns once every line is on the disk.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Passes on the first failure of an output and drops its repetitions, for outputs that warn once
/// while the run continues.
#[derive(Default)]
pub(crate) struct FirstFailure {
    seen: bool,
}

impl FirstFailure {
    pub fn first(&mut self, result: io::Result<()>) -> Option<io::Error> {
        let first = result.err().filter(|_| !self.seen);
        self.seen |= first.is_some();
        first
    }
}

/// Replaces the document at `path` atomically: it is written beside it, synced, and renamed over
/// it. A device or a pipe, which a rename would destroy, is written directly.
///
/// # Errors
/// [`Error::Storage`] if any of that fails; the old document is then untouched.
pub fn replace_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        let mut out =
            File::options().write(true).open(path).map_err(Error::storage(path, "open"))?;
        return write(&mut out).map_err(Error::storage(path, "write"));
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    let beside = path.with_file_name(name);
    // Left by a process that was killed.
    let _ = fs::remove_file(&beside);
    Disk::PLAIN.write_file(&beside, None, |file| write(file))?;
    Disk::PLAIN.rename(&beside, path)?;
    Disk::PLAIN.sync_folder(folder_of(path))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_last_line_does_not_swallow_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        fs::write(&path, "one\ntw").unwrap();
        LineFile::open(&path).unwrap().append("three").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntw\nthree\n");
    }

    #[test]
    fn a_full_disk_is_told_once() {
        let mut file = LineFile::open(Path::new("/dev/full")).unwrap();
        let mut failure = FirstFailure::default();
        let told: Vec<bool> = (0..3).map(|_| failure.first(file.append("x")).is_some()).collect();
        assert_eq!(told, [true, false, false]);
    }

    #[test]
    fn a_document_that_cannot_be_finished_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.html");
        replace_file(&path, |out| out.write_all(b"old")).unwrap();
        let failed = replace_file(&path, |out| {
            out.write_all(b"new").and(Err(io::Error::other("power cut")))
        });
        assert!(failed.unwrap_err().to_string().contains("power cut"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn a_device_is_written_to_and_stays() {
        replace_file(Path::new("/dev/null"), |out| out.write_all(b"new")).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }
}
