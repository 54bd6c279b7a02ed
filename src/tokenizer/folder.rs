//! Files of a tokenizer's folder, within limits.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::files::contents::no_json;

/// Longest vocabulary file; the longest published one has 17 MB.
pub const MAX_VOCABULARY_BYTES: u64 = 32 << 20;
/// Longest file of special tokens, ten times any published one.
pub const MAX_CONFIG_BYTES: u64 = 2 << 20;

#[derive(Clone, Copy, Debug)]
pub struct Folder<'a>(pub &'a Path);

impl Folder<'_> {
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn holds(&self, name: &str) -> bool {
        self.path(name).is_file()
    }

    /// The bytes of a file; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Data`] if it cannot be read or is longer than `most`.
    pub fn bytes(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>> {
        if !self.holds(name) {
            return Ok(None);
        }
        let path = self.path(name);
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes));
        read.map_err(|error| Error::data(&path, format!("cannot be read: {error}")))?;
        match bytes.len() as u64 > most {
            true => Err(Error::data(&path, format!("is longer than the {most} bytes allowed"))),
            false => Ok(Some(bytes)),
        }
    }

    /// A JSON file; `None` if there is none.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes); [`Error::Data`] if it is no JSON, or not of this form.
    pub fn json<T: DeserializeOwned>(&self, name: &str, most: u64) -> Result<Option<T>> {
        let Some(bytes) = self.bytes(name, most)? else { return Ok(None) };
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Some).map_err(|error| Error::data(self.path(name), no_json(&bytes, &error)))
    }

    /// For `map_err`: an error about one file of the folder.
    pub fn error<E: ToString>(&self, name: &str) -> impl FnOnce(E) -> Error + use<E> {
        let path = self.path(name);
        move |error| Error::data(path, error.to_string())
    }
}
