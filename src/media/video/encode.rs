//! MP4 files by ffmpeg.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::ffmpeg::{Ffmpeg, words};
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::media::picture::Picture;

/// Quality where the codec is H.264, nearly that of the frames.
const QUALITY: &str = "18";

/// A file that is deleted when this is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Ffmpeg {
    /// Writes frames `[F, 3, H, W]`, uint8, as an MP4 file of ffmpeg's own codec for MP4 (H.264 in
    /// most builds), replacing another file whole. Sides of an odd length get their last line once
    /// more, because the codecs halve the colours.
    ///
    /// # Errors
    /// [`Error::Storage`]; [`Error::Environment`] if ffmpeg cannot be started or fails.
    ///
    /// # Panics
    /// If the tensor has another shape or kind, or no frame.
    pub fn write_mp4(&self, path: &Path, frames: &Tensor, frames_per_second: f64) -> Result<()> {
        let size = frames.size();
        assert!(
            frames.kind() == Kind::Uint8 && size.len() == 4 && size[0] > 0 && size[1] == 3,
            "a video is [F, 3, H, W] in uint8, not {size:?} in {:?}",
            frames.kind()
        );
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".part");
        let scratch = Scratch(path.with_file_name(name));
        self.encode(&scratch.0, frames, frames_per_second)?;
        let mut encoded = File::open(&scratch.0).map_err(Error::storage(&scratch.0, "open"))?;
        replace_file(path, |out| io::copy(&mut encoded, out).map(drop))
    }

    fn encode(&self, path: &Path, frames: &Tensor, frames_per_second: f64) -> Result<()> {
        let [height, width] = [2, 3].map(|axis| (frames.size()[axis] + 1) / 2 * 2);
        let mut file = OsString::from("file:");
        file.push(path);
        let mut arguments = words(["-f", "rawvideo", "-pix_fmt", "rgb24"]);
        arguments.extend(words(["-s", &format!("{width}x{height}")]));
        arguments.extend(words(["-r", &frames_per_second.to_string(), "-i", "pipe:0"]));
        arguments.extend(words(["-pix_fmt", "yuv420p", "-crf", QUALITY]));
        arguments.extend(words(["-movflags", "+faststart", "-f", "mp4", "-y"]));
        arguments.push(file);
        let mut running = self.start(&arguments, true)?;
        let mut input = running.input();
        let fed = (0..frames.size()[0]).try_for_each(|index| {
            let frame = evened(&evened(&frames.get(index), 1), 2);
            input.write_all(Picture::from_tensor(&frame).pixels())
        });
        drop(input);
        match (running.finish(), fed) {
            ((true, _), Ok(())) => Ok(()),
            ((_, errors), _) => {
                let why = errors.lines().last().unwrap_or("it does not say why").to_string();
                Err(Error::environment(format!("ffmpeg cannot write {}: {why}", path.display())))
            }
        }
    }
}

/// Repeats the last line of an axis of odd length.
fn evened(frame: &Tensor, axis: i64) -> Tensor {
    let length = frame.size()[axis as usize];
    match length % 2 {
        0 => frame.shallow_clone(),
        _ => Tensor::cat(&[frame, &frame.narrow(axis, length - 1, 1)], axis),
    }
}
