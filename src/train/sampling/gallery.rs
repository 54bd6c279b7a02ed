//! The pictures of a run's samples: `samples/step-00000500/0.png` of the run folder, for videos
//! beside `0.mp4`, and `prompts.json`, which is written last and says what they are.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::media::Picture;
use crate::media::video::Ffmpeg;
use crate::report::{HistoryCell, HistoryRow};
use crate::run::checkpoint::{self, read_whole};
use crate::sample::prompts::PromptedPipeline;
use crate::sample::{frames_per_second, is_video};

/// Folder of all samples in the run folder.
const FOLDER: &str = "samples";
/// The list that makes a step's samples complete.
const LIST: &str = "prompts.json";
/// Largest list, and largest picture, that is read.
const MOST_LIST: u64 = 64 << 20;
const MOST_PICTURE: u64 = 64 << 20;
/// Frames of a video that its picture shows side by side.
const SHOWN_FRAMES: i64 = 4;
/// Most steps that the report shows.
const MOST_STEPS: usize = 12;

/// The samples in the folder of a run.
pub struct Gallery {
    folder: PathBuf,
    prompts: Vec<String>,
    fps: f64,
    /// `None` if no sample is a video.
    ffmpeg: Option<Ffmpeg>,
}

/// The list of a step's samples, by their numbers.
#[derive(Deserialize, Serialize)]
struct List {
    prompts: Vec<String>,
}

impl Gallery {
    /// # Errors
    /// [`Error::Environment`] if there are videos to write and no ffmpeg.
    pub fn new(run: &Path, config: &RunConfig, prompted: &PromptedPipeline) -> Result<Self> {
        let has_videos = prompted.shapes().any(is_video);
        Ok(Gallery {
            folder: run.join(FOLDER),
            prompts: config.sampling.prompts.clone(),
            fps: frames_per_second(config, prompted.family()) as f64,
            ffmpeg: has_videos.then(|| Ffmpeg::find(None)).transpose()?,
        })
    }

    /// Returns the folder of a step's samples.
    pub fn of_step(&self, step: u64) -> PathBuf {
        self.folder.join(checkpoint::folder_name(step))
    }

    /// True if the samples of a step are complete.
    pub fn has(&self, step: u64) -> bool {
        self.of_step(step).join(LIST).is_file()
    }

    /// Removes the samples of all steps after this one, which the run will make again.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn cut_after(&self, step: u64) -> Result<()> {
        let later = steps(&self.folder)?.into_iter().filter(|(found, _)| *found > step);
        later.into_iter().try_for_each(|(_, path)| {
            fs::remove_dir_all(&path).map_err(Error::storage(&path, "remove"))
        })
    }

    /// Removes all samples, which a start that failed before its first step may have left.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn clear(&self) -> Result<()> {
        match self.folder.exists() {
            true => {
                fs::remove_dir_all(&self.folder).map_err(Error::storage(&self.folder, "remove"))
            }
            false => Ok(()),
        }
    }

    /// Makes an empty folder for a step's samples.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn begin(&self, step: u64) -> Result<()> {
        let folder = self.of_step(step);
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(Error::storage(&folder, "remove"))?;
        }
        fs::create_dir_all(&folder).map_err(Error::storage(&folder, "create"))
    }

    /// Writes a sample, `[F, 3, H, W]` of bytes.
    ///
    /// # Errors
    /// [`Error::Storage`], and errors of ffmpeg.
    pub fn write(&self, step: u64, number: usize, frames: &Tensor) -> Result<()> {
        let path = |ending: &str| self.of_step(step).join(format!("{number}.{ending}"));
        if let Some(ffmpeg) = self.ffmpeg.as_ref().filter(|_| frames.size()[0] > 1) {
            ffmpeg.write_mp4(&path("mp4"), frames, self.fps)?;
        }
        Picture::from_tensor(&side_by_side(frames)).write_png(&path("png"))
    }

    /// Writes the list of a step's samples, after all of them were written.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn finish(&self, step: u64) -> Result<()> {
        let list = List { prompts: self.prompts.clone() };
        let text = serde_json::to_string_pretty(&list).expect("texts are JSON") + "\n";
        replace_file(&self.of_step(step).join(LIST), |out| out.write_all(text.as_bytes()))
    }

    /// Returns the tag and the PNG of each of a step's samples.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn pictures(&self, step: u64) -> Result<Vec<(String, Vec<u8>)>> {
        let picture = |(number, prompt): (usize, &String)| {
            let path = self.of_step(step).join(format!("{number}.png"));
            let png = read_whole(&path, MOST_PICTURE).map_err(Error::storage(&path, "read"))?;
            Ok((format!("samples/{number} {}", short(prompt)), png))
        };
        self.prompts.iter().enumerate().map(picture).collect()
    }
}

/// Returns a picture `[3, H, W]` of frames of a video side by side, from the first to the last.
fn side_by_side(frames: &Tensor) -> Tensor {
    let count = frames.size()[0];
    let shown = SHOWN_FRAMES.min(count);
    let place = |index: i64| index * (count - 1) / (shown - 1).max(1);
    let shown: Vec<Tensor> = (0..shown).map(|index| frames.get(place(index))).collect();
    Tensor::cat(&shown, -1).contiguous()
}

/// Returns the first words of a prompt, for a tag.
fn short(prompt: &str) -> String {
    const MOST: usize = 60;
    match prompt.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &prompt[..end]),
        None => prompt.into(),
    }
}

/// Returns the samples in the folder of a run for its report: a row for each prompt, and in it a
/// picture for each step, of which the first, the last and some between are taken. What cannot be
/// read is left out.
pub fn row(run: &Path) -> Vec<HistoryRow> {
    let complete = |(step, path): (u64, PathBuf)| {
        let text = read_whole(&path.join(LIST), MOST_LIST).ok()?;
        let list: List = serde_json::from_slice(&text).ok()?;
        Some((step, path, list.prompts))
    };
    let found = steps(&run.join(FOLDER)).unwrap_or_default();
    let found: Vec<_> = found.into_iter().filter_map(complete).collect();
    let mut rows: Vec<HistoryRow> = Vec::new();
    for (step, path, prompts) in evenly(&found, MOST_STEPS) {
        for (number, prompt) in prompts.iter().enumerate() {
            let png = read_whole(&path.join(format!("{number}.png")), MOST_PICTURE);
            let Some(cell) = png.ok().and_then(|png| HistoryCell::new(*step, &png)) else {
                continue;
            };
            match rows.iter_mut().find(|row| (row.number, &row.label) == (number, prompt)) {
                Some(row) => row.cells.push(cell),
                None => rows.push(HistoryRow { number, label: prompt.clone(), cells: vec![cell] }),
            }
        }
    }
    rows.sort_by_key(|row| row.number);
    rows
}

/// Returns at most `most` of the items: the first, the last, and others at even distances.
fn evenly<T>(items: &[T], most: usize) -> Vec<&T> {
    let count = items.len().min(most);
    let place = |index: usize| index * (items.len() - 1) / (count - 1).max(1);
    (0..count).map(|index| &items[place(index)]).collect()
}

/// Returns the folders of steps in their order.
fn steps(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(Error::storage(folder, "read"))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::storage(folder, "read"))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let step = name.strip_prefix("step-").and_then(|digits| digits.parse().ok());
        found.extend(step.map(|step| (step, path)));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn gallery(run: &Path, prompts: &[&str]) -> Gallery {
        let prompts = prompts.iter().map(ToString::to_string).collect();
        Gallery { folder: run.join(FOLDER), prompts, fps: 8.0, ffmpeg: None }
    }

    fn write(gallery: &Gallery, step: u64) {
        gallery.begin(step).expect("a new folder");
        for number in 0..gallery.prompts.len() {
            let grey = Tensor::full([1, 3, 8, 8], 7 * number as i64, (Kind::Uint8, Device::Cpu));
            gallery.write(step, number, &grey).expect("a disk with room");
        }
    }

    #[test]
    fn a_row_holds_complete_steps_and_ends_where_a_run_goes_on() {
        let run = tempfile::tempdir().expect("a temporary folder");
        assert!(row(run.path()).is_empty());
        let gallery = gallery(run.path(), &["a cat", "a dog"]);
        for step in [0, 4, 8, 12] {
            write(&gallery, step);
            assert!(!gallery.has(step));
            if step != 8 {
                gallery.finish(step).expect("a disk with room");
            }
        }
        let shown = |rows: &[HistoryRow]| -> Vec<(String, Vec<u64>)> {
            let steps = |row: &HistoryRow| row.cells.iter().map(|cell| cell.step).collect();
            rows.iter().map(|row| (row.label.clone(), steps(row))).collect()
        };
        let found = shown(&row(run.path()));
        assert_eq!(found, [("a cat".into(), vec![0, 4, 12]), ("a dog".into(), vec![0, 4, 12])]);
        gallery.cut_after(4).expect("own folders");
        assert!(gallery.has(4) && !gallery.has(12) && !gallery.of_step(8).exists());
        let tags: Vec<String> =
            gallery.pictures(4).expect("two").into_iter().map(|(tag, _)| tag).collect();
        assert_eq!(tags, ["samples/0 a cat", "samples/1 a dog"]);
    }

    #[test]
    fn prompts_that_changed_have_a_row_of_their_own() {
        let run = tempfile::tempdir().expect("a temporary folder");
        for (step, prompts) in [(0, ["a", "b"]), (1, ["a", "c"])] {
            let gallery = gallery(run.path(), &prompts);
            write(&gallery, step);
            gallery.finish(step).expect("a disk with room");
        }
        let rows = row(run.path());
        let lengths: Vec<(&str, usize)> =
            rows.iter().map(|row| (row.label.as_str(), row.cells.len())).collect();
        assert_eq!(lengths, [("a", 2), ("b", 1), ("c", 1)]);
    }

    #[test]
    fn many_steps_are_thinned_out_evenly() {
        let steps: Vec<u64> = (0..100).collect();
        assert_eq!(evenly(&steps, 4), [&0, &33, &66, &99]);
        assert_eq!(evenly(&steps[..3], 12), [&0, &1, &2]);
        assert_eq!(evenly(&steps[..1], 12), [&0]);
        assert!(evenly(&steps[..0], 12).is_empty());
    }

    #[test]
    fn a_video_is_shown_by_some_of_its_frames() {
        let frames = Tensor::arange(9, (Kind::Uint8, Device::Cpu)).view([9, 1, 1, 1]);
        let shown = side_by_side(&frames.expand([9, 3, 2, 2], false));
        assert_eq!(shown.size(), [3, 2, 8]);
        let row = Vec::<u8>::try_from(shown.get(0).get(0)).expect("bytes");
        assert_eq!(row, [0, 0, 2, 2, 5, 5, 8, 8]);
    }
}
