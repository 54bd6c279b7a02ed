//! Videos: frames by the program `ffmpeg`, or by a folder of pictures.
//!
//! | question | file |
//! |---|---|
//! | which frames stand for a video | `choice.rs` |
//! | a folder of frames | `folder.rs` |
//! | the program: where it is, and what it says | `ffmpeg.rs` |
//! | frames that it decodes | `decode.rs` |
//! | MP4 files | `encode.rs` |

mod choice;
mod decode;
mod encode;
mod ffmpeg;
mod folder;

use std::path::{Path, PathBuf};

pub use choice::{chosen, kept};
pub use ffmpeg::Ffmpeg;

use super::fit::{Fit, Size};
use super::picture::Picture;
use super::read::{Limits, has_ending, picture_size};
use crate::error::Result;

/// Endings of the names of videos.
const VIDEOS: [&str; 7] = ["mp4", "mov", "mkv", "webm", "avi", "m4v", "mpg"];

/// Returns true if a file's name ends as that of a video, in whatever case.
pub fn is_video(path: &Path) -> bool {
    has_ending(path, &VIDEOS)
}

/// A video whose size and length are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Video {
    source: Source,
    pub size: Size,
    pub frames: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    File(PathBuf),
    /// Frames in their order.
    Folder(Vec<PathBuf>),
}

impl Video {
    /// Asks ffmpeg for the size of a file's first frame and for the number of its frames. Files cut
    /// without encoding hold frames that are never shown: if the file holds at most twice `most`
    /// frames, so that nearly all may be taken, it is decoded to count those that are shown.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if ffmpeg finds no video or its frames are beyond
    /// the limits; [`Error::Environment`](crate::error::Error::Environment) if ffmpeg cannot be
    /// started.
    pub fn open(
        path: &Path,
        most: usize,
        ffmpeg: Option<&Ffmpeg>,
        limits: &Limits,
    ) -> Result<Self> {
        let ffmpeg = ffmpeg.ok_or_else(ffmpeg::missing)?;
        let (size, frames) = decode::probe(path, most, ffmpeg, limits)?;
        Ok(Video { source: Source::File(path.into()), size, frames })
    }

    /// Takes the pictures of a folder as frames, in the order of their names with numbers in their
    /// own order. The first one gives the size.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if it holds none or the first one is not
    /// readable; [`Error::Storage`](crate::error::Error::Storage).
    pub fn open_folder(path: &Path, limits: &Limits) -> Result<Self> {
        let frames = folder::frames_of(path)?;
        let size = picture_size(&frames[0], limits)?;
        let count = frames.len();
        Ok(Video { source: Source::Folder(frames), size, frames: count })
    }

    /// Returns `count` frames, chosen evenly ([`chosen`]), each at the size of `fit`.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if a frame is damaged, missing or of another size
    /// than the first; [`Error::Environment`](crate::error::Error::Environment) if ffmpeg cannot be
    /// started, or `ffmpeg` is unset where a file needs it.
    pub fn read(
        &self,
        count: usize,
        fit: Fit,
        ffmpeg: Option<&Ffmpeg>,
        limits: &Limits,
    ) -> Result<Vec<Picture>> {
        match &self.source {
            Source::Folder(frames) => folder::read(frames, self.size, count, fit, limits),
            Source::File(path) => {
                decode::read(path, self, count, fit, ffmpeg.ok_or_else(ffmpeg::missing)?)
            }
        }
    }

    /// Returns the files whose bytes the frames come from.
    pub fn files(&self) -> &[PathBuf] {
        match &self.source {
            Source::File(path) => std::slice::from_ref(path),
            Source::Folder(frames) => frames,
        }
    }
}
