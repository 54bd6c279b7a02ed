//! Verifies that a folder is an undamaged checkpoint.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Component, Path};

use serde::Deserialize;

use super::{FORMAT, MANIFEST, Manifest, SavedFile, VERSION, VERSION_WITHOUT_RECORD};
use crate::error::{Error, Result, one_line, shortened};
use crate::files::contents::{Format, HEAD_BYTES, no_json, recognized};
use crate::files::sha256::HashingWriter;
use crate::run::requests;

/// Longest manifest that is read; enough for ten thousand files of a gigabyte each.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Reason why a folder cannot be used as a checkpoint.
#[derive(Debug)]
pub enum Unfit {
    /// It differs from what was written; an earlier checkpoint may be sound.
    Corrupt { file: String, what: String },
    /// Another checkpoint would not help: the folder is of another program, or the disk cannot be
    /// read.
    Other(Error),
}

impl Unfit {
    fn corrupt(file: &str, what: impl Into<String>) -> Self {
        Unfit::Corrupt { file: shortened(one_line(file)), what: shortened(one_line(&what.into())) }
    }

    /// Returns the error for a caller that needs this very checkpoint.
    pub fn into_error(self, folder: &Path) -> Error {
        match self {
            Unfit::Corrupt { file, what } => Error::checkpoint_mismatch(folder.join(file), what),
            Unfit::Other(error) => error,
        }
    }
}

/// The fields that manifests of every version have.
#[derive(Deserialize)]
struct Version {
    format: String,
    version: u64,
}

/// Reads the manifest and verifies its hash and the size and hash of every file.
///
/// # Errors
/// The first file at fault; [`Error::Stopped`] if a signal arrived meanwhile.
pub fn verify(folder: &Path) -> Result<Manifest, Unfit> {
    let manifest = read(folder)?;
    for part in &manifest.parts {
        verify_part(folder, part)?;
    }
    Ok(manifest)
}

/// Reads only the manifest.
///
/// # Errors
/// [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn manifest(folder: &Path) -> Result<Manifest> {
    read(folder).map_err(|unfit| unfit.into_error(folder))
}

fn read(folder: &Path) -> Result<Manifest, Unfit> {
    let broken = |what: String| Unfit::corrupt(MANIFEST, what);
    let path = folder.join(MANIFEST);
    let text = read_whole(&path, MAX_MANIFEST_BYTES)
        .map_err(|error| unreadable(&path, MANIFEST, error))?;
    let said: Version = serde_json::from_slice(&text)
        .map_err(|error| broken(format!("is no manifest: {}", no_json(&text, &error))))?;
    if said.format != FORMAT || !(VERSION_WITHOUT_RECORD..=VERSION).contains(&said.version) {
        let what = format!(
            "is {:?} version {}, this program reads {FORMAT:?} version {VERSION}, and the parameters of version {VERSION_WITHOUT_RECORD}",
            said.format, said.version
        );
        return Err(Unfit::Other(Error::checkpoint_mismatch(path, what)));
    }
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| broken(format!("is no manifest: {error}")))?;
    if manifest.sha256 != manifest.digest() {
        return Err(broken("sha256 differs".into()));
    }
    Ok(manifest)
}

fn verify_part(folder: &Path, part: &SavedFile) -> Result<(), Unfit> {
    let (path, broken) = (folder.join(&part.file), |what: String| Unfit::corrupt(&part.file, what));
    if !matches!(Path::new(&part.file).components().collect::<Vec<_>>()[..], [Component::Normal(_)])
    {
        return Err(broken("leaves the checkpoint's folder".into()));
    }
    let unreadable = |error| unreadable(&path, &part.file, error);
    let found = fs::metadata(&path).map_err(unreadable)?;
    if !found.is_file() {
        return Err(broken("is not a regular file".into()));
    }
    let bytes = found.len();
    if bytes != part.bytes {
        let instead = foreign_format(&path).map(|what| format!(": {what}")).unwrap_or_default();
        return Err(broken(format!("has {bytes} of {} bytes{instead}", part.bytes)));
    }
    let mut hashing = HashingWriter::new(io::sink());
    let read =
        File::open(&path).and_then(|file| io::copy(&mut Listening(file.take(bytes)), &mut hashing));
    requests::go_on().map_err(Unfit::Other)?;
    read.map_err(unreadable)?;
    let (_, sha256, _) = hashing.finish();
    if sha256 == part.sha256 { Ok(()) } else { Err(broken("sha256 differs".into())) }
}

/// Names the kind of file found in place of a safetensors file, such as a Git LFS pointer.
fn foreign_format(path: &Path) -> Option<String> {
    let mut head = Vec::new();
    File::open(path).and_then(|file| file.take(HEAD_BYTES as u64).read_to_end(&mut head)).ok()?;
    recognized(&head, Format::SafeTensors)
}

/// A reader that fails once a signal asks this process to stop.
struct Listening<R>(R);

impl<R: Read> Read for Listening<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        requests::go_on().map_err(io::Error::other)?;
        self.0.read(buffer)
    }
}

/// Reads a regular file of at most `max_bytes`: opening a FIFO would block, and a device may have
/// no end.
pub fn read_whole(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let refused = |what: String| Err(io::Error::new(ErrorKind::InvalidData, what));
    if !fs::metadata(path)?.is_file() {
        return refused("is not a regular file".into());
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        refused(format!("is longer than the {max_bytes} bytes allowed"))
    } else {
        Ok(bytes)
    }
}

/// Classifies a read error: a missing file or a bad sector is corruption, a permission error is
/// not.
fn unreadable(path: &Path, file: &str, error: io::Error) -> Unfit {
    let lost = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData)
        || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
    if lost {
        Unfit::corrupt(file, format!("cannot be read: {error}"))
    } else {
        Unfit::Other(Error::storage(path, "read")(error))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;
    use crate::config::RunConfig;
    use crate::data::OnSmallGroup;
    use crate::run::checkpoint::AllowedChanges;

    fn part(file: &str, bytes: u64) -> SavedFile {
        SavedFile { file: file.into(), bytes, sha256: "0".repeat(64) }
    }

    fn refusal(folder: &Path, part: &SavedFile) -> String {
        verify_part(folder, part).expect_err("a hostile part").into_error(folder).to_string()
    }

    #[test]
    fn a_part_that_is_no_file_of_the_folder_is_refused_unopened() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["../a.safetensors", "..", ".", "/", "/etc/passwd", ""] {
            assert!(
                refusal(folder.path(), &part(name, 4096))
                    .ends_with("leaves the checkpoint's folder"),
                "{name:?}"
            );
        }
        assert!(
            Command::new("mkfifo")
                .arg(folder.path().join("fifo"))
                .status()
                .expect("mkfifo")
                .success()
        );
        symlink("/dev/zero", folder.path().join("endless")).expect("a link");
        for name in ["fifo", "endless"] {
            assert!(
                refusal(folder.path(), &part(name, 0)).ends_with("is not a regular file"),
                "{name}"
            );
        }
    }

    #[test]
    fn a_part_that_is_a_pointer_is_called_one() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(
            folder.path().join("a.safetensors"),
            "version https://git-lfs.github.com/spec/v1\n",
        )
        .expect("a file");
        let said = refusal(folder.path(), &part("a.safetensors", 4096));
        assert!(said.contains("has 43 of 4096 bytes: is a Git LFS pointer"), "{said}");
    }

    #[test]
    fn a_manifest_that_is_no_file_or_too_long_is_refused_unread() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, refusal) = (folder.path().join(MANIFEST), || {
            manifest(folder.path()).expect_err("no manifest").to_string()
        });
        symlink("/dev/zero", &path).expect("a link");
        assert!(refusal().ends_with("cannot be read: is not a regular file"), "{}", refusal());
        fs::remove_file(&path).expect("a link");
        File::create(&path).and_then(|file| file.set_len(MAX_MANIFEST_BYTES + 1)).expect("a file");
        assert!(
            refusal().ends_with("cannot be read: is longer than the 4194304 bytes allowed"),
            "{}",
            refusal()
        );
    }

    #[test]
    fn a_checkpoint_of_version_2_is_read_and_by_its_name_not_resumed() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = RunConfig::default();
        let now = Manifest::new(&config, 8, "data".into());
        let old = Manifest { version: 2, config: None, lr: None, ..now.clone() };
        let text = old.sealed();
        assert!(
            !text.contains("config") && !text.contains("lr"),
            "the text that version 2 wrote: {text}"
        );
        std::fs::write(folder.path().join(MANIFEST), text).expect("a file");
        let read = verify(folder.path()).expect("sound");
        let error = read
            .check_same_run(
                folder.path(),
                &config,
                &now,
                AllowedChanges { data: true, batch: true },
            )
            .expect_err("never guessed")
            .to_string();
        assert!(error.contains("is of version 2, which records no configuration"), "{error}");
        let allowed = AllowedChanges::default();
        let told = now.check_same_run(folder.path(), &config, &now, allowed);
        assert_eq!(told.expect("the same run"), [""; 0]);
    }

    #[test]
    fn what_becomes_of_small_groups_is_the_runs_data_and_a_batch_may_make_groups_small() {
        let config = RunConfig::default();
        let of = |batch, rule| Manifest::new(&config, batch, "data".into()).with_small_groups(rule);
        let resumed = |was: &Manifest, now: &Manifest, data, batch| {
            was.check_same_run(Path::new("run"), &config, now, AllowedChanges { data, batch })
        };
        let [drop, repeat] =
            [OnSmallGroup::Drop, OnSmallGroup::Repeat].map(|rule| of(8, Some(rule)));
        let error = resumed(&drop, &repeat, false, true).expect_err("other data").to_string();
        let told =
            "data.on_small_group is repeat, the checkpoint's was drop (--allow-data-change goes";
        assert!(error.contains(told), "{error}");
        assert_eq!(resumed(&drop, &repeat, true, false).expect("allowed").len(), 1);
        let larger = of(16, Some(OnSmallGroup::Drop));
        assert_eq!(resumed(&of(8, None), &larger, false, true).expect("allowed").len(), 1);
        assert_eq!(resumed(&larger, &of(8, None), false, true).expect("allowed").len(), 1);
    }
}
