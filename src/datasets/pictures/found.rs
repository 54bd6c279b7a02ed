//! The samples of a folder, and the files that were left out.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use super::PictureOptions;
use super::item::{Access, Examined, Item, Pixels};
use crate::error::{Error, Result};
use crate::media::video::Ffmpeg;
use crate::media::{Limits, Size};

/// Damaged files that a message names.
const NAMED: usize = 5;

/// A file that was left out, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    pub path: PathBuf,
    pub what: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.what)
    }
}

/// The samples of a folder.
#[derive(Debug)]
pub struct Found {
    /// In the order of their names.
    pub items: Vec<Item>,
    pub skipped: Vec<Skipped>,
    folder: PathBuf,
    masks: bool,
    most_bad: f64,
    limits: Limits,
    ffmpeg: Option<Ffmpeg>,
}

impl Found {
    pub(super) fn new(options: &PictureOptions, ffmpeg: Option<Ffmpeg>) -> Self {
        Found {
            items: Vec::new(),
            skipped: Vec::new(),
            folder: options.folder.clone(),
            masks: options.masks.is_some(),
            most_bad: options.most_bad,
            limits: options.limits,
            ffmpeg,
        }
    }

    /// Returns the pixels of an item, its mask and its controls.
    ///
    /// # Errors
    /// [`Error::Data`] if a file is damaged or was changed; [`Error::Environment`] of ffmpeg;
    /// [`Error::Storage`].
    pub fn read(&self, index: usize) -> Result<Pixels> {
        self.items[index].read(self.masks, self.access())
    }

    /// Reads an item whole, and returns the hash of its content, or the damage. It is how damaged
    /// pixels are found before a dataset is planned; ranks may share the items.
    ///
    /// # Errors
    /// [`Error::Environment`] of ffmpeg; [`Error::Storage`].
    pub fn examine(&self, index: usize) -> Result<Examined> {
        let item = &self.items[index];
        let content = || {
            item.read(self.masks, self.access())?;
            item.content(self.masks)
        };
        match content() {
            Ok(content) => Ok(Examined::Sound(content)),
            Err(Error::Data { path, what }) => {
                Ok(Examined::Damaged { path: path.to_string_lossy().into_owned(), what })
            }
            Err(other) => Err(other),
        }
    }

    /// Leaves out the damaged items; `examined` has what became of each. Returns the others, and
    /// the hash of each.
    ///
    /// # Errors
    /// [`Error::Data`] if the share of damaged files is too large.
    ///
    /// # Panics
    /// If there are not as many outcomes as items.
    pub fn sound(mut self, examined: Vec<Examined>) -> Result<(Found, Vec<String>)> {
        assert_eq!(examined.len(), self.items.len(), "every item was examined");
        let mut hashes = Vec::new();
        for (item, outcome) in std::mem::take(&mut self.items).into_iter().zip(examined) {
            match outcome {
                Examined::Sound(hash) => {
                    hashes.push(hash);
                    self.items.push(item);
                }
                Examined::Damaged { path, what } => {
                    self.skipped.push(Skipped { path: path.into(), what });
                }
            }
        }
        Ok((self.checked()?, hashes))
    }

    /// Refuses more damaged files than the options allow.
    pub(super) fn checked(self) -> Result<Found> {
        let (bad, all) = (self.skipped.len(), self.items.len() + self.skipped.len());
        if bad as f64 <= self.most_bad * all as f64 && bad < all {
            return Ok(self);
        }
        let named: Vec<String> = self.skipped.iter().take(NAMED).map(Skipped::to_string).collect();
        let what = format!(
            "{bad} of {all} files cannot be used, and the share that may be skipped is {}: {}",
            self.most_bad,
            named.join("; ")
        );
        Err(Error::data(&self.folder, what))
    }

    /// Returns every bucket, as `WxH` or `FxWxH`, with its number of samples, smaller ones first.
    pub fn buckets(&self) -> Vec<(String, usize)> {
        let mut counts = BTreeMap::new();
        for item in &self.items {
            let size = item.medium.fit.size;
            let key = (item.frames, size.pixels(), size);
            *counts.entry(key).or_insert(0) += item.captions.len();
        }
        let counts = counts.into_iter();
        counts.map(|((frames, _, size), count)| (named(frames, size), count)).collect()
    }

    /// Returns the number of items whose caption is their name.
    pub fn named_only(&self) -> usize {
        self.items.iter().filter(|item| !item.has_caption).count()
    }

    /// Returns the number of items without a mask where others have one: all of their pixels count.
    pub fn unmasked(&self) -> usize {
        self.items.iter().filter(|item| self.masks && item.mask.is_none()).count()
    }

    /// Returns lines for the user: buckets, skipped files, missing captions and masks.
    pub fn notes(&self) -> Vec<String> {
        let buckets: Vec<String> =
            self.buckets().into_iter().map(|(name, count)| format!("{count} of {name}")).collect();
        let mut notes = vec![format!("buckets: {}", buckets.join(", "))];
        let bad = self.skipped.iter().map(|skipped| format!("skipped: {skipped}"));
        notes.extend(bad);
        let (all, named, unmasked) = (self.items.len(), self.named_only(), self.unmasked());
        if named > 0 {
            notes.push(format!("{named} of {all} have no caption: their names are taken"));
        }
        if unmasked > 0 {
            notes.push(format!("{unmasked} of {all} have no mask: all of their pixels count"));
        }
        notes
    }

    fn access(&self) -> Access<'_> {
        Access { ffmpeg: self.ffmpeg.as_ref(), limits: &self.limits }
    }
}

fn named(frames: Option<usize>, size: Size) -> String {
    match frames {
        Some(frames) => format!("{frames}x{size}"),
        None => size.to_string(),
    }
}
