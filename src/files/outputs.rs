//! Checks the files that a command writes at its end, before it computes anything.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A path from the command line, with the argument that gave it.
#[derive(Clone, Copy)]
pub struct Named<'p> {
    pub argument: &'static str,
    pub path: &'p Path,
}

/// Refuses `outputs` that cannot be written, that are the same file, or that are one of the
/// `inputs`.
///
/// # Errors
/// [`Error::Config`] naming the argument, the path and what was expected.
pub fn check_files(outputs: &[Named<'_>], inputs: &[Named<'_>]) -> Result<()> {
    for (index, output) in outputs.iter().enumerate() {
        let place = output.real_path()?;
        for other in &outputs[..index] {
            if other.real_path()? == place {
                return Err(output.refused("is given twice"));
            }
        }
        let same =
            |input: &&Named<'_>| fs::canonicalize(input.path).is_ok_and(|path| path == place);
        if let Some(input) = inputs.iter().find(same) {
            return Err(
                output.refused(format!("is what {} reads; give another name", input.argument))
            );
        }
    }
    Ok(())
}

/// Refuses a folder that could not be created, along with its parents; the caller checks if it
/// exists already.
///
/// # Errors
/// As [`check_files`].
pub fn check_new_folder(output: Named<'_>) -> Result<()> {
    let above = output.path.ancestors().skip(1).map(non_empty).find(|folder| folder.exists());
    output.check_folder(above.unwrap_or(Path::new(".")))
}

/// Locks a file that is open for writing, which NFS asks for, as long as it is open. A file system
/// without locks is taken as it is.
///
/// # Errors
/// [`Error::Data`] naming the `folder` if another process holds the file.
pub fn hold(file: &File, folder: &Path) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            Err(Error::data(folder, "is being written by another process"))
        }
        Err(TryLockError::Error(error)) => {
            tracing::debug!("{} cannot be locked: {error}", folder.display());
            Ok(())
        }
    }
}

/// Refuses a path at which there is anything: nothing that a command made is written over.
///
/// # Errors
/// [`Error::Storage`].
pub fn refuse_existing(out: &Path) -> Result<()> {
    if out.symlink_metadata().is_err() {
        return Ok(());
    }
    let exists = io::Error::new(
        io::ErrorKind::AlreadyExists,
        "exists already; an export never writes over anything",
    );
    Err(Error::Storage { path: out.into(), operation: "create", source: exists })
}

impl Named<'_> {
    /// Returns the real path of a file that can be written.
    fn real_path(&self) -> Result<PathBuf> {
        let name =
            self.path.file_name().filter(|_| !self.path.as_os_str().as_bytes().ends_with(b"/"));
        let Some(name) = name.filter(|_| !self.path.is_dir()) else {
            return Err(self.refused("is a folder; expected a file"));
        };
        if fs::metadata(self.path).is_ok_and(|found| !found.is_file()) {
            // A device or a pipe is written directly.
            return Ok(self.path.into());
        }
        let folder = self.path.parent().map_or(Path::new("."), non_empty);
        self.check_folder(folder)?;
        let folder = folder
            .canonicalize()
            .map_err(|error| self.refused(format!("folder {}: {error}", folder.display())))?;
        Ok(folder.join(name))
    }

    fn check_folder(&self, folder: &Path) -> Result<()> {
        if !folder.exists() {
            return Err(
                self.refused(format!("folder {} does not exist; make it first", folder.display()))
            );
        }
        if !folder.is_dir() {
            return Err(self.refused(format!("{} is no folder", folder.display())));
        }
        // Permissions are not enough: root has them all, even where nothing can be written.
        let trial = folder.join(format!(".fm-dist-{}.tmp", std::process::id()));
        let written = File::create(&trial).and_then(|_| fs::remove_file(&trial));
        written.map_err(|error| {
            self.refused(format!("cannot write into folder {}: {error}", folder.display()))
        })
    }

    /// Returns the error that names argument and path.
    pub fn refused(&self, what: impl AsRef<str>) -> Error {
        Error::config(self.argument, format!("{}: {}", self.path.display(), what.as_ref()))
    }
}

/// Returns the current folder for the empty parent of a relative path with one component.
fn non_empty(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(outputs: &[&Path], inputs: &[&Path]) -> String {
        let named = |argument| move |path: &&'_ Path| (argument, path.to_path_buf());
        let owned: Vec<_> =
            outputs.iter().map(named("--out")).chain(inputs.iter().map(named("--batch"))).collect();
        let all: Vec<Named<'_>> =
            owned.iter().map(|(argument, path)| Named { argument, path }).collect();
        let (outputs, inputs) = all.split_at(outputs.len());
        check_files(outputs, inputs).map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn files_that_could_not_be_written_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink(root.path(), path("link")).unwrap();
        assert_eq!(
            told(
                &[&path("a.png"), &path("a.safetensors"), &path("file"), Path::new("/dev/null")],
                &[&path("b")]
            ),
            ""
        );
        assert!(told(&[&path("no/a.png")], &[]).ends_with("no does not exist; make it first"));
        assert!(told(&[&path("file/a.png")], &[]).ends_with("file is no folder"));
        assert!(told(&[root.path()], &[]).ends_with("is a folder; expected a file"));
        assert!(told(&[&path("new/")], &[]).ends_with("is a folder; expected a file"));
        assert!(told(&[Path::new("/proc/a.png")], &[]).contains("cannot write into folder /proc"));
        assert!(
            told(&[&path("a.png"), &path("link/a.png")], &[])
                .ends_with("link/a.png: is given twice")
        );
        assert!(
            told(&[&path("link/file")], &[&path("file")])
                .ends_with("is what --batch reads; give another name")
        );
    }

    #[test]
    fn a_folder_can_be_made_below_any_that_can_be_written() {
        let root = tempfile::tempdir().unwrap();
        let check = |path: &Path| check_new_folder(Named { argument: "--out", path });
        check(&root.path().join("a/b/c")).unwrap();
        check(Path::new("a")).unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        assert!(
            check(&root.path().join("file/b"))
                .unwrap_err()
                .to_string()
                .ends_with("file is no folder")
        );
        assert!(
            check(Path::new("/proc/b/c"))
                .unwrap_err()
                .to_string()
                .contains("cannot write into folder /proc")
        );
    }
}
