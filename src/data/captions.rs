//! Captions and sources of the samples: a file with one JSON object a line, in the order of sample
//! ids. They are for people and for tools; training reads the cached embeddings instead.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::manifest::{self, CaptionsEntry};
use crate::error::{Error, Result, one_line};
use crate::files::safetensors::open_error;
use crate::files::sha256;

/// Longest line that is read.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// Bytes of the file that are read at once.
const PIECE_BYTES: usize = 1 << 20;

/// One sample's line.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Caption {
    pub caption: String,
    /// Name of the picture or video that the sample was made from; empty if unknown.
    #[serde(default)]
    pub source: String,
    /// Width and height of the picture before it was resized; none if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_resolution: Option<[u32; 2]>,
    /// Columns and rows that were cut off at the left and at the top of the resized picture; none
    /// if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crop_offset: Option<[u32; 2]>,
}

impl Caption {
    pub fn new(caption: impl Into<String>, source: impl Into<String>) -> Self {
        Caption { caption: caption.into(), source: source.into(), ..Caption::default() }
    }
}

/// A dataset's captions; the file is read on demand.
#[derive(Debug)]
pub struct Captions {
    path: PathBuf,
    entry: CaptionsEntry,
}

impl Captions {
    /// # Errors
    /// [`Error::Data`] if the path is not a regular file.
    pub(super) fn open(path: PathBuf, entry: CaptionsEntry) -> Result<Self> {
        if !fs::metadata(&path).map_err(|error| open_error(&path, error))?.is_file() {
            return Err(Error::data(path, "is not a regular file"));
        }
        Ok(Captions { path, entry })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Calls `each` for every line, in the order of sample ids.
    ///
    /// # Errors
    /// [`Error::Data`] naming a line that is malformed or too long; the first error of `each`.
    pub fn for_each(&self, mut each: impl FnMut(Caption) -> Result<()>) -> Result<()> {
        let file = File::open(&self.path).map_err(|error| open_error(&self.path, error))?;
        let mut lines = BufReader::with_capacity(PIECE_BYTES, file);
        let mut line = Vec::new();
        for number in 1u64.. {
            line.clear();
            (&mut lines)
                .take(MAX_LINE_BYTES)
                .read_until(b'\n', &mut line)
                .map_err(Error::storage(&self.path, "read"))?;
            if line.is_empty() {
                break;
            }
            let refused = |what: &str| {
                Err(Error::data(&self.path, format!("line {number} {}", one_line(what))))
            };
            if line.len() as u64 == MAX_LINE_BYTES {
                return refused("is longer than a caption may be");
            }
            match serde_json::from_slice(&line) {
                Ok(caption) => each(caption)?,
                Err(error) => return refused(&format!("is no caption: {error}")),
            }
        }
        Ok(())
    }

    /// Compares the file with its hash and with the number of samples.
    ///
    /// # Errors
    /// [`Error::Data`] if it differs or a line is malformed.
    pub(super) fn verify(&self, samples: u64) -> Result<()> {
        let found = sha256::of_file(&self.path)?;
        let expected = &self.entry.sha256;
        if found != *expected {
            let what = format!("has sha256 {found}, {} says {expected}", manifest::FILE_NAME);
            return Err(Error::data(&self.path, what));
        }
        self.check_count(samples)
    }

    /// Checks that there is one sound line for each sample.
    ///
    /// # Errors
    /// [`Error::Data`] if there is not.
    pub fn check_count(&self, samples: u64) -> Result<()> {
        let mut lines = 0;
        self.for_each(|_| {
            lines += 1;
            Ok(())
        })?;
        if lines != samples {
            let what = format!("has {lines} lines, expected one for each of {samples} samples");
            return Err(Error::data(&self.path, what));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::data::Dataset;
    use crate::data::made_up::{images, written_as};

    /// A dataset of three samples with these captions, whose hash is right.
    fn dataset(lines: &str) -> (tempfile::TempDir, Dataset) {
        let parts = [("a.safetensors", "2x2", vec![("image_latents", images(0, 3, 2))])];
        let folder = written_as(2, &parts, None);
        let path = folder.path().join(manifest::FILE_NAME);
        fs::write(folder.path().join("captions.jsonl"), lines).expect("a file");
        let mut manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).expect("written")).expect("JSON");
        let sha256 = sha256::hex(Sha256::new_with_prefix(lines));
        manifest["captions"] = serde_json::json!({"path": "captions.jsonl", "sha256": sha256});
        fs::write(&path, manifest.to_string()).expect("written again");
        let dataset = Dataset::open(folder.path()).expect("a sound dataset");
        (folder, dataset)
    }

    #[test]
    fn captions_are_read_in_the_order_of_samples() {
        let lines = "{\"caption\":\"a cat\",\"source\":\"a.png\"}\n{\"caption\":\"\"}\n{\"caption\":\"b\"}\n";
        let (_folder, dataset) = dataset(lines);
        dataset.verify_hashes().expect("as the manifest says");
        let mut found = Vec::new();
        let captions = dataset.captions().expect("captions");
        let read = captions.for_each(|line| {
            found.push((line.caption, line.source));
            Ok(())
        });
        read.expect("sound lines");
        let expected = [("a cat", "a.png"), ("", ""), ("b", "")];
        assert_eq!(found, expected.map(|(caption, source)| (caption.into(), source.into())));
    }

    #[test]
    fn captions_that_are_changed_malformed_or_too_few_are_found() {
        let refused = |lines: &str| {
            let (_folder, dataset) = dataset(lines);
            dataset.verify_hashes().expect_err("refused").to_string()
        };
        let line = "{\"caption\":\"a\"}\n";
        assert!(refused(line).ends_with("has 1 lines, expected one for each of 3 samples"));
        assert!(
            refused(&format!("{line}{{\"text\":1}}\n")).contains("line 2 is no caption: unknown")
        );
        let long = format!("{{\"caption\":\"{}\"}}\n", "a".repeat(1 << 20));
        assert!(refused(&long).ends_with("line 1 is longer than a caption may be"));
        let (folder, dataset) = dataset(&line.repeat(3));
        fs::write(folder.path().join("captions.jsonl"), "").expect("written again");
        let error = dataset.verify_hashes().expect_err("changed").to_string();
        assert!(error.contains("captions.jsonl: has sha256 "), "{error}");
    }
}
