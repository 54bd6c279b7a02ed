//! Frames that ffmpeg decodes.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::Path;

use super::Video;
use super::choice::chosen;
use super::ffmpeg::{Ffmpeg, words};
use crate::error::{Error, Result};
use crate::files::safetensors::open_error;
use crate::media::fit::{Fit, Size};
use crate::media::picture::Picture;
use crate::media::read::Limits;
use crate::pulse;

/// Bytes of the header of a PPM file, and more.
const PPM_HEAD_BYTES: u64 = 64;
/// Most bytes of a report on progress that are read.
const MOST_REPORT_BYTES: u64 = 1 << 20;

/// Frames that are counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Counted {
    /// Those that the container holds.
    Held,
    /// Those that are shown, which takes decoding all.
    Decoded,
}

/// Returns the size of the first frame and the number of frames: of those that are shown, or of
/// those that the container holds if these are more than twice `most`.
pub(super) fn probe(
    path: &Path,
    most: usize,
    ffmpeg: &Ffmpeg,
    limits: &Limits,
) -> Result<(Size, usize)> {
    // Opening a FIFO would wait for its writer.
    if !fs::metadata(path).map_err(|error| open_error(path, error))?.is_file() {
        return Err(Error::data(path, "is not a regular file"));
    }
    let size = first_size(path, ffmpeg, limits)?;
    let mut frames = count(path, ffmpeg, Counted::Held)?;
    if frames <= most.saturating_mul(2) {
        frames = count(path, ffmpeg, Counted::Decoded)?;
    }
    if frames == 0 {
        return Err(Error::data(path, "holds no frame"));
    }
    Ok((size, frames))
}

/// Returns the arguments that open a local file, and nothing that it names elsewhere.
fn input(path: &Path) -> Vec<OsString> {
    let mut file = OsString::from("file:");
    file.push(path);
    let words = ["-nostdin", "-threads", "1", "-protocol_whitelist", "file,pipe", "-i"];
    words.map(OsString::from).into_iter().chain([file]).collect()
}

fn first_size(path: &Path, ffmpeg: &Ffmpeg, limits: &Limits) -> Result<Size> {
    let mut arguments = words(["-max_pixels", &limits.pixels.to_string()]);
    arguments.extend(input(path));
    arguments.extend(words(["-map", "0:v:0", "-frames:v", "1", "-pix_fmt", "rgb24"]));
    arguments.extend(words(["-c:v", "ppm", "-f", "image2pipe", "pipe:1"]));
    let mut running = ffmpeg.start(&arguments, false)?;
    let mut head = Vec::new();
    let read = running.output().take(PPM_HEAD_BYTES).read_to_end(&mut head);
    let Some(size) = read.ok().and_then(|_| ppm_size(&head)) else {
        return Err(refused(path, &running.finish().1));
    };
    limits.check(path, size).map(|()| size)
}

/// Returns the size that the head of a PPM file tells.
fn ppm_size(head: &[u8]) -> Option<Size> {
    let text = String::from_utf8_lossy(head.strip_prefix(b"P6")?);
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    Some(Size::new(numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Counts frames by ffmpeg's own report.
fn count(path: &Path, ffmpeg: &Ffmpeg, counted: Counted) -> Result<usize> {
    let mut arguments = input(path);
    arguments.extend(words(["-map", "0:v:0"]));
    match counted {
        Counted::Held => arguments.extend(words(["-c", "copy"])),
        Counted::Decoded => arguments.extend(words(ffmpeg.all_frames())),
    }
    arguments.extend(words(["-f", "null", "-progress", "pipe:1", "-nostats", "-"]));
    let mut running = ffmpeg.start(&arguments, false)?;
    let mut report = String::new();
    let read = running.output().take(MOST_REPORT_BYTES).read_to_string(&mut report);
    let (succeeded, errors) = running.finish();
    let last = report.lines().rev().find_map(|line| line.strip_prefix("frame="));
    match last.and_then(|number| number.trim().parse().ok()).filter(|_| succeeded && read.is_ok()) {
        Some(frames) => Ok(frames),
        None => Err(refused(path, &errors)),
    }
}

/// Reads `most` frames, chosen evenly, or all if there are no more; each at the size of `fit`.
pub(super) fn read(
    path: &Path,
    video: &Video,
    most: usize,
    fit: Fit,
    ffmpeg: &Ffmpeg,
) -> Result<Vec<Picture>> {
    let wanted = most.min(video.frames);
    let of = |available| {
        let frames = chosen(available, wanted);
        frames_at(path, video.size, &frames, fit, ffmpeg)
    };
    let (frames, _) = of(video.frames)?;
    if frames.len() == wanted {
        return Ok(frames);
    }
    // Containers also count frames that are never shown.
    let shown = count(path, ffmpeg, Counted::Decoded)?;
    if shown < wanted {
        let what = format!("holds {} frames, of which {shown} are shown", video.frames);
        return Err(Error::data(path, what));
    }
    let (frames, errors) = of(shown)?;
    if frames.len() == wanted { Ok(frames) } else { Err(refused(path, &errors)) }
}

/// Decodes the frames of these numbers, which rise; returns those that came, and what ffmpeg said
/// if some did not.
fn frames_at(
    path: &Path,
    size: Size,
    numbers: &[usize],
    fit: Fit,
    ffmpeg: &Ffmpeg,
) -> Result<(Vec<Picture>, String)> {
    let select: Vec<String> = numbers.iter().map(|number| format!("eq(n\\,{number})")).collect();
    let Size { width, height } = size;
    let filter = format!("select={},scale={width}:{height}", select.join("+"));
    let mut arguments = input(path);
    arguments.extend(words(["-map", "0:v:0", "-vf", &filter]));
    arguments.extend(words(ffmpeg.all_frames()));
    arguments.extend(words(["-frames:v", &numbers.len().to_string()]));
    arguments.extend(words(["-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"]));
    let mut running = ffmpeg.start(&arguments, false)?;
    let mut output = running.output();
    let (mut frames, mut bytes) = (Vec::new(), vec![0; 3 * size.pixels() as usize]);
    while frames.len() < numbers.len() {
        pulse::still_at_work();
        if output.read_exact(&mut bytes).is_err() {
            drop(output);
            return Ok((frames, running.finish().1));
        }
        frames.push(Picture::from_pixels(size, bytes.clone()).fitted(fit));
    }
    Ok((frames, String::new()))
}

fn refused(path: &Path, why: &str) -> Error {
    match why.lines().last() {
        Some(why) => Error::data(path, format!("is no video that ffmpeg reads: {why}")),
        None => Error::data(path, "is no video that ffmpeg reads"),
    }
}
