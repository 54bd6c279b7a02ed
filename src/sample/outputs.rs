//! The files that samples are written to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use crate::config::RunConfig;
use crate::encoding::Family;
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::files::outputs::{Named, check_files};
use crate::files::safetensors;
use crate::media::Picture;
use crate::media::video::Ffmpeg;
use crate::report::write_grid;
use crate::sample::generate::Samples;
use crate::settings::Choice;

/// The argument that names them.
const ARGUMENT: &str = "--out";

/// File formats of samples.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Format {
    Picture,
    Video,
    Numbers,
}

pub(super) fn format_of(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "png" => Some(Format::Picture),
        "mp4" => Some(Format::Video),
        "safetensors" => Some(Format::Numbers),
        _ => None,
    }
}

/// Refuses files of unknown formats, and those that could not be written or are one of `inputs`.
pub(super) fn check_outputs(out: &[PathBuf], inputs: &[Named<'_>]) -> Result<()> {
    if let Some(path) = out.iter().find(|path| format_of(path).is_none()) {
        let what = format!("{} must end in .png, .mp4 or .safetensors", path.display());
        return Err(Error::config(ARGUMENT, what));
    }
    let outputs: Vec<Named<'_>> =
        out.iter().map(|path| Named { argument: ARGUMENT, path }).collect();
    check_files(&outputs, inputs)
}

/// Writes samples of conditions as a labelled grid or as numbers, depending on the file's ending.
pub(super) fn write_samples(samples: &Samples, path: &Path) -> Result<()> {
    if format_of(path) == Some(Format::Picture) {
        let columns = samples.per_condition as usize;
        return write_grid(path, &samples.images, &samples.names, columns, None);
    }
    let sigmas = Tensor::from_slice(&samples.sigmas).to_kind(Kind::Float);
    let tensors = [("samples", &samples.images), ("labels", &samples.labels), ("sigmas", &sigmas)];
    replace_file(path, |mut file| safetensors::write(&mut file, &tensors, &BTreeMap::new()))
}

/// True if decoded latents `[C, (F,) H, W]` are a video.
pub fn is_video(latents: &[i64]) -> bool {
    matches!(*latents, [_, frames, _, _] if frames > 1)
}

/// Returns the configured frames a second of videos, or those of the family.
///
/// Source: the `fps` with which the examples of diffusers 0.42.1's pipelines export their videos.
pub fn frames_per_second(config: &RunConfig, family: Family) -> i64 {
    match (config.sampling.fps, family.word()) {
        (0, "wan") => 16,
        (0, _) => 24,
        (fps, _) => fps,
    }
}

/// The files of samples of prompts: each picture or video has its own.
pub(super) struct Files<'o> {
    out: &'o [PathBuf],
    /// Number of samples.
    count: usize,
    fps: i64,
    ffmpeg: Option<Ffmpeg>,
}

impl<'o> Files<'o> {
    /// Refuses files that samples of these latents cannot be written to. `shapes`: latents of the
    /// samples, `[C, (F,) H, W]`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the file and what was expected;
    /// [`Error::Environment`] if ffmpeg is needed and missing.
    pub fn new(
        out: &'o [PathBuf],
        shapes: &[&[i64]],
        fps: i64,
        ffmpeg: Option<&Path>,
        inputs: &[Named<'_>],
    ) -> Result<Self> {
        let mut files = Files { out, count: shapes.len(), fps, ffmpeg: None };
        let refused =
            |path: &Path, what: &str| Err(Named { argument: ARGUMENT, path }.refused(what));
        for path in out {
            match format_of(path) {
                Some(Format::Picture) if shapes.iter().any(|shape| is_video(shape)) => {
                    return refused(
                        path,
                        "is a picture, and the samples are videos; end it in .mp4",
                    );
                }
                Some(Format::Video) if !shapes.iter().all(|shape| is_video(shape)) => {
                    return refused(
                        path,
                        "is a video, and the samples are pictures; end it in .png",
                    );
                }
                Some(Format::Numbers) if shapes.iter().any(|shape| *shape != shapes[0]) => {
                    let what = "holds latents of one shape, and the prompts have several sizes";
                    return refused(path, what);
                }
                Some(Format::Video) => files.ffmpeg = Some(Ffmpeg::find(ffmpeg)?),
                _ => {}
            }
        }
        let paths = files.all();
        let outputs: Vec<Named<'_>> =
            paths.iter().map(|path| Named { argument: ARGUMENT, path }).collect();
        check_files(&outputs, inputs)?;
        Ok(files)
    }

    /// True if samples are decoded.
    pub fn are_decoded(&self) -> bool {
        self.out.iter().any(|path| format_of(path) != Some(Format::Numbers))
    }

    /// Writes the pictures or videos of the sample `index`; `frames`: `[F, 3, H, W]` of bytes.
    ///
    /// # Errors
    /// [`Error::Storage`], and errors of ffmpeg.
    pub fn write(&self, index: usize, frames: &Tensor) -> Result<()> {
        for path in self.out {
            let own = self.of_sample(path, index);
            match (format_of(path), &self.ffmpeg) {
                (Some(Format::Picture), _) => {
                    Picture::from_tensor(&frames.get(0)).write_png(&own)?
                }
                (Some(Format::Video), Some(ffmpeg)) => {
                    ffmpeg.write_mp4(&own, frames, self.fps as f64)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes the latents of all samples, `[1, C, (F,) H, W]` each, and the noise levels.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn write_numbers(&self, latents: &[Tensor], sigmas: &[f64]) -> Result<()> {
        let numbers = self.out.iter().filter(|path| format_of(path) == Some(Format::Numbers));
        numbers.into_iter().try_for_each(|path| {
            let samples = Tensor::cat(latents, 0);
            let sigmas = Tensor::from_slice(sigmas).to_kind(Kind::Float);
            let tensors = [("samples", &samples), ("sigmas", &sigmas)];
            replace_file(path, |mut file| safetensors::write(&mut file, &tensors, &BTreeMap::new()))
        })
    }

    /// Returns every file.
    pub fn all(&self) -> Vec<PathBuf> {
        let of_path = |path: &PathBuf| -> Vec<PathBuf> {
            match format_of(path) {
                Some(Format::Numbers) => vec![path.clone()],
                _ => (0..self.count).map(|index| self.of_sample(path, index)).collect(),
            }
        };
        self.out.iter().flat_map(of_path).collect()
    }

    /// Returns the file of a sample: `cat.png`, or with several samples `cat-0.png`, `cat-1.png`, …
    fn of_sample(&self, path: &Path, index: usize) -> PathBuf {
        if self.count == 1 {
            return path.into();
        }
        let [stem, ending] = [path.file_stem(), path.extension()]
            .map(|part| part.unwrap_or_default().to_string_lossy().into_owned());
        path.with_file_name(format!("{stem}-{index}.{ending}"))
    }
}
