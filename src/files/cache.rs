//! The program's cache folder: results that are dear to compute and can be lost at any time.
//!
//! An entry is a file of its own, named by the hash of its key, so that processes and nodes that
//! share a home folder never lose each other's entries. It begins with the hash of the rest, by
//! which a damaged one is recognized.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files::disk::Disk;
use crate::files::sha256::hex;
use crate::pulse;

/// Entries of one kind, e.g. results of trials.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The entries of a kind below the program's cache folder. Nothing is created before the first
    /// [`write`](Self::write).
    pub fn new(program: &Path, kind: &str) -> Self {
        Cache { folder: program.join(kind) }
    }

    /// Returns the bytes that were written under `key`; `None` if there are none, or if they cannot
    /// be read or are damaged.
    pub fn read(&self, key: &str) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(key)).ok()?;
        let rest = bytes.strip_prefix(format!("{}\n", hash(&[bytes.get(65..)?])).as_bytes())?;
        Some(rest.strip_prefix(key.as_bytes())?.strip_prefix(b"\n")?.to_vec())
    }

    /// Writes an entry beside its place and renames it there, so that no reader sees half of it.
    /// `key`: one line that names all that the bytes depend on.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn write(&self, key: &str, bytes: &[u8]) -> Result<()> {
        fs::create_dir_all(&self.folder).map_err(Error::storage(&self.folder, "create"))?;
        let (path, rest) = (self.path(key), [key.as_bytes(), b"\n", bytes].concat());
        let beside = path.with_extension(format!("{}-{}.tmp", pulse::host(), std::process::id()));
        // Left by an earlier process of this number.
        let _ = fs::remove_file(&beside);
        Disk::PLAIN.write_file(&beside, None, |file| {
            writeln!(file, "{}", hash(&[&rest]))?;
            file.write_all(&rest)
        })?;
        Disk::PLAIN.rename(&beside, &path)
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(hash(&[key.as_bytes()]))
    }
}

fn hash(parts: &[&[u8]]) -> String {
    let mut sha256 = Sha256::new();
    parts.iter().for_each(|part| sha256.update(part));
    hex(sha256)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only_file(folder: &Path) -> PathBuf {
        let mut files = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("one"));
        let (first, second) = (files.next().expect("a file"), files.next());
        assert!(second.is_none(), "{second:?}");
        first.path()
    }

    #[test]
    fn an_entry_is_found_by_its_whole_key_and_replaced_whole() {
        let root = tempfile::tempdir().expect("a folder");
        let cache = Cache::new(&root.path().join("fm-dist"), "trials");
        assert_eq!(cache.read("libtorch 2.13.0"), None);
        for bytes in [&b"sound\n"[..], b""] {
            cache.write("libtorch 2.13.0", bytes).expect("room");
            assert_eq!(cache.read("libtorch 2.13.0").as_deref(), Some(bytes));
        }
        assert_eq!(cache.read("libtorch 2.13"), None);
        only_file(&root.path().join("fm-dist/trials"));
    }

    #[test]
    fn a_damaged_entry_is_none() {
        let root = tempfile::tempdir().expect("a folder");
        let cache = Cache::new(root.path(), "trials");
        cache.write("key", b"sound").expect("room");
        let path = only_file(&root.path().join("trials"));
        let whole = fs::read(&path).expect("a file");
        let mut flipped = whole.clone();
        *flipped.last_mut().expect("not empty") ^= 1;
        for damaged in [&whole[..whole.len() - 1], &whole[..30], b"", &flipped] {
            fs::write(&path, damaged).expect("room");
            assert_eq!(cache.read("key"), None, "{damaged:?}");
        }
        fs::write(&path, &whole).expect("room");
        assert_eq!(cache.read("key").as_deref(), Some(&b"sound"[..]));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_and_an_unreadable_one_holds_nothing() {
        let root = tempfile::tempdir().expect("a folder");
        let file = root.path().join("file");
        fs::write(&file, "").expect("room");
        let cache = Cache::new(&file, "trials");
        assert_eq!(cache.write("key", b"").map_err(|error| error.exit_code()), Err(30));
        assert_eq!(cache.read("key"), None);
    }
}
