//! Folders of pictures or videos: the samples in them, found by their headers before anything is
//! decoded, and their pixels.
//!
//! | question | file |
//! |---|---|
//! | what is found, and which bucket it goes to | here |
//! | pictures, videos, masks and controls that belong together | `files.rs` |
//! | captions | `captions/` |
//! | buckets | `buckets.rs` |
//! | what was found and what was skipped; reading it | `found.rs` |
//! | pixels, masks and controls of one sample, and the hash of its content | `item.rs` |

mod buckets;
pub mod captions;
mod files;
mod found;
mod item;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use buckets::{BucketOptions, Buckets, Ratios};
pub use captions::CaptionOptions;
pub use found::{Found, Skipped};
use item::Access;
pub use item::{Examined, Item, Medium, Pixels};

use super::parallel::in_parallel;
use crate::error::{Error, Result};
use crate::media::video::{Ffmpeg, kept};
use crate::media::{Limits, picture_size};
use captions::{Lists, caption_beside, rank_of_list};
use files::{Entry, Finder};

/// Number of frames that are taken of a video.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameOptions {
    /// Most frames; a longer video gives this many at equal distances.
    pub most: usize,
    /// The number of frames is one more than a multiple of it: an autoencoder's factor of time.
    pub step: usize,
}

/// Options of reading a folder of pictures or videos.
#[derive(Clone, Debug)]
pub struct PictureOptions {
    pub folder: PathBuf,
    /// Unset, samples are pictures, and videos are left alone. Set, samples are videos: video
    /// files, folders below `folder` whose pictures are frames, and pictures of `folder` as one
    /// frame.
    pub frames: Option<FrameOptions>,
    pub captions: CaptionOptions,
    /// Folder of masks, each by the name of its picture with any ending.
    pub masks: Option<PathBuf>,
    /// Folders of further inputs of a model, each by the name of its picture with any ending.
    pub controls: Vec<PathBuf>,
    pub buckets: BucketOptions,
    /// The program that reads videos; that in `PATH` if unset.
    pub ffmpeg: Option<PathBuf>,
    pub limits: Limits,
    /// Largest share of damaged files that are skipped, from 0 to 1.
    pub most_bad: f64,
    /// Number of threads.
    pub jobs: usize,
}

/// Finds the samples of a folder. Reads headers and captions only.
///
/// # Errors
/// [`Error::Config`] if an option is out of its range; [`Error::Data`] if there are no samples, a
/// list of captions is malformed, or too large a share of the files is damaged, lacks a control or
/// has a malformed caption; [`Error::Environment`] if videos need ffmpeg and it is missing;
/// [`Error::Storage`].
pub fn find(options: &PictureOptions) -> Result<Found> {
    if !(0.0..=1.0).contains(&options.most_bad) {
        return Err(Error::config("--bad-share", "is a share, from 0 to 1"));
    }
    if options.frames.is_some_and(|frames| frames.most == 0 || frames.step == 0) {
        return Err(Error::config("--frames", "a video has at least one frame"));
    }
    let buckets =
        Buckets::new(options.buckets).map_err(|what| Error::config("--max-pixels", what))?;
    let finder = Finder::new(options)?;
    let ffmpeg = match finder.needs_ffmpeg() {
        true => Some(Ffmpeg::find(options.ffmpeg.as_deref())?),
        false => None,
    };
    let search = Search { lists: lists(options, &finder)?, options, buckets, finder, ffmpeg };
    let entries = search.finder.entries();
    let outcomes = in_parallel(entries, options.jobs, |entry| search.outcome(entry))?;
    let mut found = Found::new(options, search.ffmpeg);
    for outcome in outcomes {
        match outcome {
            Outcome::Item(item) => found.items.push(item),
            Outcome::Skipped(skipped) => found.skipped.push(skipped),
        }
    }
    let found = found.checked()?;
    match &options.captions.list {
        Some(list) if found.named_only() == found.items.len() => {
            let what = format!(
                "names none of the pictures in {}; its names are paths from its own folder, or from that of the \
                 pictures if it lies elsewhere, with or without the ending",
                options.folder.display()
            );
            Err(Error::data(list, what))
        }
        _ => Ok(found),
    }
}

/// Returns the captions of the given list, or of those in the folder, of which the first that has a
/// picture counts for it.
fn lists(options: &PictureOptions, finder: &Finder) -> Result<Lists> {
    let (mut lists, field) = (Lists::default(), options.captions.field.as_deref());
    let Some(list) = &options.captions.list else {
        let mut own: Vec<&PathBuf> = finder.lists().iter().collect();
        own.sort_by_key(|list| (rank_of_list(list), *list));
        for list in own {
            lists.read(list, list.parent().unwrap_or(&finder.folder), field)?;
        }
        return Ok(lists);
    };
    // A list that lies elsewhere has names as seen from the pictures.
    let parent = list.canonicalize().ok().and_then(|list| list.parent().map(Path::to_path_buf));
    let base = parent.filter(|parent| parent.starts_with(&finder.folder));
    lists.read(list, base.as_ref().unwrap_or(&finder.folder), field)?;
    Ok(lists)
}

/// The outcome of looking at a file.
enum Outcome {
    Item(Item),
    Skipped(Skipped),
}

/// All that a file's sample depends on.
struct Search<'o> {
    options: &'o PictureOptions,
    buckets: Buckets,
    finder: Finder,
    lists: Lists,
    ffmpeg: Option<Ffmpeg>,
}

impl Search<'_> {
    fn outcome(&self, entry: &Entry) -> Result<Outcome> {
        match self.item(entry) {
            Ok(item) => Ok(Outcome::Item(item)),
            Err(Error::Data { path, what }) => Ok(Outcome::Skipped(Skipped { path, what })),
            Err(other) => Err(other),
        }
    }

    /// Returns the entry's item.
    fn item(&self, entry: &Entry) -> Result<Item> {
        let access = Access { ffmpeg: self.ffmpeg.as_ref(), limits: &self.options.limits };
        let most = self.options.frames.map_or(1, |frames| frames.most);
        let medium = Medium::open(entry, most, access, |size| self.buckets.size_for(size))?;
        let bucket = medium.fit.size;
        let controls = self.finder.controls(entry)?.into_iter();
        let controls = controls
            .map(|control| Medium::open(control, most, access, |_| Some(bucket)))
            .collect::<Result<Vec<_>>>()?;
        let mask = self.finder.mask(entry).map(Path::to_path_buf);
        if let Some(mask) = &mask {
            picture_size(mask, access.limits)?;
        }
        let captions = self.captions(entry)?;
        let has_caption = captions.is_some();
        let file = entry.path.file_name().unwrap_or_default().to_string_lossy();
        let captions = captions.unwrap_or_else(|| vec![name_as_caption(&entry.stem)]);
        let treated = |caption: &String| self.options.captions.treated(caption, &file);
        let frames = self
            .options
            .frames
            .map(|FrameOptions { most, step }| kept(medium.frames(), most, step));
        let name = entry.path.strip_prefix(&self.finder.folder).unwrap_or(&entry.path);
        Ok(Item {
            name: name.to_string_lossy().into_owned(),
            captions: captions.iter().map(treated).collect(),
            has_caption,
            frames,
            mask,
            controls,
            medium,
        })
    }

    /// Returns what the first source of captions says that has the entry.
    fn captions(&self, entry: &Entry) -> Result<Option<Vec<String>>> {
        let options = &self.options.captions;
        let listed = || self.lists.of(&entry.path).cloned();
        if options.list.is_some() {
            return Ok(listed());
        }
        let beside = self.finder.folder.join(&entry.stem);
        Ok(caption_beside(&beside, options.field.as_deref())?.or_else(listed))
    }
}

/// Returns the name of a file without its ending, with blanks for underscores.
fn name_as_caption(stem: &Path) -> String {
    stem.file_name().unwrap_or_default().to_string_lossy().replace('_', " ")
}
