//! One folder of a dataset: what its `dataset.json` lists besides samples.

use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::sample_file::SampleFile;
use crate::data::captions::Captions;
use crate::data::empty_prompt::EmptyPrompt;
use crate::data::manifest::{self, Manifest};
use crate::error::{Error, Result};
use crate::files::safetensors::SafeTensors;
use crate::files::sha256;

/// A folder with `dataset.json`; a dataset has one, or several that are mixed.
#[derive(Debug)]
pub struct Folder {
    pub(super) path: PathBuf,
    pub(super) manifest: Manifest,
    /// Ids of its samples.
    pub(super) sample_ids: Range<u64>,
    pub(super) captions: Option<Captions>,
    pub(super) conditions: Option<SafeTensors>,
    pub(super) empty_prompt: Option<EmptyPrompt>,
    /// Times that an epoch takes each of its samples, besides the repeats of their files.
    pub(super) repeats: u64,
    pub(super) weight: f64,
}

impl Folder {
    pub(super) fn new(path: PathBuf, manifest: Manifest) -> Self {
        let sample_ids = 0..0;
        let (captions, conditions, empty_prompt) = (None, None, None);
        let (repeats, weight) = (1, 0.0);
        Folder { path, manifest, sample_ids, captions, conditions, empty_prompt, repeats, weight }
    }

    /// Returns the folder's path, or `embedded`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns name, source and licence of the data, and the list of files.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the ids of its samples.
    pub fn sample_ids(&self) -> Range<u64> {
        self.sample_ids.clone()
    }

    /// Returns its share of an epoch relative to the other folders' weights; 0: by size.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Returns hex digits that change with its files and with how often they are taken; those of
    /// the manifest if each sample is taken once.
    pub(super) fn fingerprint(&self) -> String {
        let manifest = self.manifest.fingerprint();
        if self.repeats == 1 && self.weight == 0.0 {
            return manifest;
        }
        let text = format!("{manifest} {} {:?}", self.repeats, self.weight);
        sha256::hex(Sha256::new_with_prefix(text))
    }

    /// Compares its `files` and the others with their hashes in `dataset.json`.
    ///
    /// # Errors
    /// [`Error::Data`] for the first file that differs.
    pub(super) fn verify_hashes(&self, files: &[SampleFile]) -> Result<()> {
        let files = files
            .iter()
            .map(|file| &file.tensors)
            .zip(self.manifest.files.iter().map(|entry| &entry.sha256));
        let conditions =
            self.conditions.iter().zip(self.manifest.conditions.iter().map(|entry| &entry.sha256));
        let empty_prompt = self.empty_prompt.iter().map(|empty| &empty.file);
        let empty_prompt =
            empty_prompt.zip(self.manifest.empty_prompt.iter().map(|entry| &entry.sha256));
        for (file, expected) in files.chain(conditions).chain(empty_prompt) {
            let mut hash = Sha256::new();
            file.for_each_piece(|piece| hash.update(piece))?;
            let found = sha256::hex(hash);
            if found != *expected {
                return Err(Error::data(
                    file.path(),
                    format!("has sha256 {found}, {} says {expected}", manifest::FILE_NAME),
                ));
            }
        }
        let samples = self.sample_ids.end - self.sample_ids.start;
        self.captions.iter().try_for_each(|captions| captions.verify(samples))
    }
}
