//! One picture or video: its pixels, and the hash of its content.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::files::{Entry, MediumKind};
use crate::error::{Error, Result};
use crate::files::safetensors::open_error;
use crate::files::sha256;
use crate::media::video::{Ffmpeg, Video};
use crate::media::{Fit, Limits, Picture, Size, picture_size, stacked};

/// A picture or video, and its way to its bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct Medium {
    pub path: PathBuf,
    /// Size of the picture, turned as its EXIF data say.
    pub original: Size,
    pub fit: Fit,
    video: Option<Video>,
    /// Length and time of its file when it was looked at; unset of a folder of frames.
    stamp: Option<Stamp>,
}

/// Length of a file, and the time of its last change.
type Stamp = (u64, Option<SystemTime>);

fn stamp(path: &Path) -> Result<Stamp> {
    let found = fs::metadata(path).map_err(|error| open_error(path, error))?;
    Ok((found.len(), found.modified().ok()))
}

impl Medium {
    /// Reads headers, and chooses the bucket by the size; `frames` are taken of a video at most.
    ///
    /// # Errors
    /// [`Error::Data`] if it is damaged, beyond the limits or fits no bucket;
    /// [`Error::Environment`] of ffmpeg; [`Error::Storage`].
    pub(super) fn open(
        entry: &Entry,
        frames: usize,
        access: Access<'_>,
        bucket: impl FnOnce(Size) -> Option<Size>,
    ) -> Result<Self> {
        let path = entry.path.clone();
        let is_file = entry.kind != MediumKind::Frames;
        let stamp = is_file.then(|| stamp(&path)).transpose()?;
        let video = match entry.kind {
            MediumKind::Picture => None,
            MediumKind::Video => Some(Video::open(&path, frames, access.ffmpeg, access.limits)?),
            MediumKind::Frames => Some(Video::open_folder(&path, access.limits)?),
        };
        let original = match &video {
            Some(video) => video.size,
            None => picture_size(&path, access.limits)?,
        };
        let too_small =
            || Error::data(&path, format!("has {original} pixels, too few for a bucket"));
        let size = bucket(original).ok_or_else(too_small)?;
        let fit = Fit::new(original, size).map_err(|what| Error::data(&path, what))?;
        Ok(Medium { path, original, fit, video, stamp })
    }

    /// Returns the number of frames; 1 of a picture.
    pub fn frames(&self) -> usize {
        self.video.as_ref().map_or(1, |video| video.frames)
    }

    /// Returns the pixels at the bucket's size: `[3, H, W]`, or `[3, F, H, W]` with `frames`. A
    /// file that was changed since is refused: its bucket and its hash are those of the earlier
    /// one.
    fn read(&self, frames: Option<usize>, access: Access<'_>) -> Result<Tensor> {
        if self.stamp.is_some_and(|seen| stamp(&self.path).is_ok_and(|found| found != seen)) {
            return Err(Error::data(&self.path, "was changed while the folder was read"));
        }
        let Some(video) = &self.video else {
            let picture = Picture::read(&self.path, access.limits)?.fitted(self.fit).to_tensor();
            return Ok(if frames.is_some() { picture.unsqueeze(1) } else { picture });
        };
        let wanted = frames.unwrap_or(1);
        let read = video.read(wanted, self.fit, access.ffmpeg, access.limits)?;
        match read.len() == wanted {
            true => Ok(stacked(&read)),
            false => {
                let what = format!("has {} frames where {wanted} are needed", read.len());
                Err(Error::data(&self.path, what))
            }
        }
    }

    /// Returns the files that its pixels come from.
    fn files(&self) -> &[PathBuf] {
        match &self.video {
            Some(video) => video.files(),
            None => std::slice::from_ref(&self.path),
        }
    }
}

/// The options that reading takes besides the files.
#[derive(Clone, Copy)]
pub(super) struct Access<'a> {
    pub ffmpeg: Option<&'a Ffmpeg>,
    pub limits: &'a Limits,
}

/// A picture or video with all that belongs to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Path from the folder that was searched.
    pub name: String,
    /// At least one; each is a sample with the same pixels.
    pub captions: Vec<String>,
    /// False if its name stands for its caption.
    pub has_caption: bool,
    /// Number of frames that are read; unset for a picture.
    pub frames: Option<usize>,
    /// The picture's or video's place, its size, and its way to its bucket.
    pub medium: Medium,
    pub mask: Option<PathBuf>,
    /// One for each folder of controls.
    pub controls: Vec<Medium>,
}

/// The pixels of an item at its bucket's size, uint8.
#[derive(Debug)]
pub struct Pixels {
    /// `[3, H, W]`, or `[3, F, H, W]` of a video.
    pub pixels: Tensor,
    /// `[H, W]`, 255 where everything counts. Unset where no folder of masks was given.
    pub mask: Option<Tensor>,
    /// Each as `pixels`; a picture beside a video has one frame.
    pub controls: Vec<Tensor>,
}

/// The outcome of reading an item whole.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Examined {
    /// The hash of its files and of what is done with their pixels, in hex digits.
    Sound(String),
    /// The problem, and the file that has it.
    Damaged { path: String, what: String },
}

impl Item {
    /// Reads the pixels; with `masks`, an item without a mask has one of 255.
    pub(super) fn read(&self, masks: bool, access: Access<'_>) -> Result<Pixels> {
        let pixels = self.medium.read(self.frames, access)?;
        let fit = self.medium.fit;
        let whole = || {
            let shape = [i64::from(fit.size.height), i64::from(fit.size.width)];
            Tensor::full(shape, 255, (Kind::Uint8, Device::Cpu))
        };
        let mask = match &self.mask {
            Some(mask) => Some(Picture::read_mask(mask, fit, access.limits)?),
            None => masks.then(whole),
        };
        let control = |control: &Medium| {
            let is_still = control.video.is_none();
            control.read(self.frames.map(|frames| if is_still { 1 } else { frames }), access)
        };
        let controls = self.controls.iter().map(control).collect::<Result<Vec<_>>>()?;
        Ok(Pixels { pixels, mask, controls })
    }

    /// Returns the hash of all bytes that the pixels come from, and of the sizes that they get.
    pub(super) fn content(&self, masks: bool) -> Result<String> {
        let mut hash = Sha256::new();
        let Fit { resized, crop, size } = self.medium.fit;
        let frames = self.frames.map_or(0, |frames| frames);
        hash.update(format!("{frames} {resized} {} {} {size} {masks}\n", crop.left, crop.top));
        let mut file = |role: &str, path: &Path| {
            hash.update(format!("{role} {}\n", sha256::of_file(path)?));
            Ok(())
        };
        self.medium.files().iter().try_for_each(|path| file("pixels", path))?;
        self.mask.iter().try_for_each(|path| file("mask", path))?;
        for (number, control) in self.controls.iter().enumerate() {
            let role = format!("control {number}");
            control.files().iter().try_for_each(|path| file(&role, path))?;
        }
        Ok(sha256::hex(hash))
    }
}
