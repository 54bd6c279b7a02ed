//! Files that belong together: a picture or video, its mask and its controls.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::PictureOptions;
use super::captions::is_list;
use crate::datasets::index;
use crate::error::{Error, Result};
use crate::media::is_picture;
use crate::media::video::is_video;

/// The kind of a file or folder that becomes a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediumKind {
    Picture,
    Video,
    /// A folder whose pictures are frames.
    Frames,
}

/// A picture or video that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub path: PathBuf,
    pub kind: MediumKind,
    /// Its path from the folder that was searched, without an ending.
    pub stem: PathBuf,
}

impl Entry {
    fn new(path: PathBuf, kind: MediumKind, folder: &Path) -> Self {
        let relative = path.strip_prefix(folder).unwrap_or(&path);
        let stem = match kind {
            MediumKind::Frames => relative.to_path_buf(),
            _ => relative.with_extension(""),
        };
        Entry { stem, path, kind }
    }
}

/// Files by their stems.
type ByStem = BTreeMap<PathBuf, Entry>;

/// The files in the folders of a dataset.
pub struct Finder {
    pub folder: PathBuf,
    entries: Vec<Entry>,
    lists: Vec<PathBuf>,
    masks: Option<ByStem>,
    controls: Vec<ByStem>,
}

impl Finder {
    /// # Errors
    /// [`Error::Data`] if two masks or two controls belong to one picture; [`Error::Storage`] if a
    /// folder cannot be listed.
    pub fn new(options: &PictureOptions) -> Result<Self> {
        let real = |path: &PathBuf| path.canonicalize().map_err(Error::storage(path, "find"));
        let folder = real(&options.folder)?;
        let masks = options.masks.as_ref().map(real).transpose()?;
        let controls = options.controls.iter().map(real).collect::<Result<Vec<_>>>()?;
        // They may lie below the pictures, and are no samples.
        let others: Vec<&PathBuf> = masks.iter().chain(&controls).collect();
        let is_own = |path: &Path| {
            !others.iter().any(|other| other.starts_with(&folder) && path.starts_with(other))
        };
        let videos = options.frames.is_some();
        let mut files = Vec::new();
        let wanted = |path: &Path| is_picture(path) || is_video(path) || is_list(path);
        index::find_if(&folder, &wanted, &mut files)?;
        files.retain(|path| is_own(path));
        let (lists, media): (Vec<_>, Vec<_>) = files.into_iter().partition(|path| is_list(path));
        let entries = entries(&folder, media, videos);
        if entries.is_empty() {
            let what = match videos {
                true => "holds no video, folder of frames or picture",
                false => "holds no PNG, JPEG or WebP file, and videos are not wanted",
            };
            return Err(Error::data(&options.folder, what));
        }
        let masks = masks.map(|masks| by_stem(&masks, false)).transpose()?;
        let controls = controls.iter().map(|folder| by_stem(folder, videos));
        let controls = controls.collect::<Result<Vec<_>>>()?;
        Ok(Finder { folder, entries, lists, masks, controls })
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Returns the lists of captions in the folder.
    pub fn lists(&self) -> &[PathBuf] {
        &self.lists
    }

    /// Returns true if a video file is among the samples or controls.
    pub fn needs_ffmpeg(&self) -> bool {
        let controls = self.controls.iter().flat_map(ByStem::values);
        self.entries.iter().chain(controls).any(|entry| entry.kind == MediumKind::Video)
    }

    pub fn mask(&self, entry: &Entry) -> Option<&Path> {
        self.masks.as_ref()?.get(&entry.stem).map(|mask| mask.path.as_path())
    }

    /// Returns the entry's control in each folder of controls.
    ///
    /// # Errors
    /// [`Error::Data`] if one is missing.
    pub fn controls(&self, entry: &Entry) -> Result<Vec<&Entry>> {
        let mut controls = Vec::new();
        for (index, folder) in self.controls.iter().enumerate() {
            controls.push(folder.get(&entry.stem).ok_or_else(|| {
                let what = format!("has no file of its name in folder {} of controls", index + 1);
                Error::data(&entry.path, what)
            })?);
        }
        Ok(controls)
    }
}

/// Returns the samples among files, in the order of the files.
fn entries(folder: &Path, files: Vec<PathBuf>, videos: bool) -> Vec<Entry> {
    let mut folders = BTreeSet::new();
    let entry = |path: PathBuf| {
        if is_video(&path) {
            return videos.then(|| Entry::new(path, MediumKind::Video, folder));
        }
        match path.parent().filter(|parent| videos && *parent != folder).map(Path::to_path_buf) {
            Some(frames) => folders
                .insert(frames.clone())
                .then(|| Entry::new(frames, MediumKind::Frames, folder)),
            None => Some(Entry::new(path, MediumKind::Picture, folder)),
        }
    };
    files.into_iter().filter_map(entry).collect()
}

/// Finds the files of a folder of masks or controls.
fn by_stem(folder: &Path, videos: bool) -> Result<ByStem> {
    let mut files = Vec::new();
    let wanted = |path: &Path| is_picture(path) || (videos && is_video(path));
    index::find_if(folder, &wanted, &mut files)?;
    let mut found = ByStem::new();
    for entry in entries(folder, files, videos) {
        let path = entry.path.clone();
        if let Some(other) = found.insert(entry.stem.clone(), entry) {
            let what =
                format!("and {} have one name, which picture's are they?", other.path.display());
            return Err(Error::data(path, what));
        }
    }
    Ok(found)
}
