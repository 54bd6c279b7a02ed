//! Lists of captions: JSON, JSONL and CSV.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Component, Path, PathBuf};

use serde::de::DeserializeSeed;

use super::rows::{Row, Rows, rank_of_field, rank_of_name};
use super::{FIELDS, MAX_CAPTION_BYTES, MAX_CAPTIONS, NAMES};
use crate::error::{Error, Result};
use crate::files::safetensors::open_error;

/// Names of lists in folders of pictures, and their endings.
const STEMS: [&str; 3] = ["metadata", "captions", "meta"];
const ENDINGS: [&str; 3] = ["jsonl", "json", "csv"];
/// End of the names of the reference's lists, which have a row a line.
const REFERENCE_LIST: &str = "_internvl.json";
/// Longest list.
const MAX_LIST_BYTES: u64 = 1 << 30;

/// Returns true if a folder's file is a list of captions by its name.
pub fn is_list(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plain = name.rsplit_once('.');
    name.ends_with(REFERENCE_LIST)
        || plain.is_some_and(|(stem, ending)| STEMS.contains(&stem) && ENDINGS.contains(&ending))
}

/// Orders the lists of a folder: the first that has a picture counts for it.
pub fn rank_of_list(path: &Path) -> (usize, usize) {
    let place = |words: &[&str], word: Option<&OsStr>| {
        words.iter().position(|known| word == Some(OsStr::new(known))).unwrap_or(words.len())
    };
    (place(&STEMS, path.file_stem()), place(&ENDINGS, path.extension()))
}

/// Captions by the pictures' paths.
#[derive(Debug, Default)]
pub struct Lists {
    captions: BTreeMap<PathBuf, Vec<String>>,
}

impl Lists {
    /// Adds the captions of one list, of pictures that no list before it has. Its names are paths
    /// from `folder`, which is without links, or absolute ones.
    ///
    /// # Errors
    /// [`Error::Data`] if the list is malformed or too long; [`Error::Storage`].
    pub fn read(&mut self, path: &Path, folder: &Path, field: Option<&str>) -> Result<()> {
        let found = fs::metadata(path).map_err(|error| open_error(path, error))?;
        if !found.is_file() || found.len() > MAX_LIST_BYTES {
            let what = format!("is no file of at most {MAX_LIST_BYTES} bytes, as lists are");
            return Err(Error::data(path, what));
        }
        let file = BufReader::new(File::open(path).map_err(|error| open_error(path, error))?);
        let mut rows = Vec::new();
        match path.extension().is_some_and(|ending| ending == "csv") {
            true => read_csv(path, file, field, &mut rows)?,
            false => read_json(path, file, field, &mut rows)?,
        }
        let (mut own, mut parents) = (BTreeMap::<PathBuf, Vec<String>>::new(), BTreeMap::new());
        for (name, caption) in rows {
            let picture = match Path::new(&name).is_absolute() {
                true => real(Path::new(&name), &mut parents),
                false => plain(&folder.join(&name)),
            };
            let captions = own.entry(picture).or_default();
            if captions.len() >= MAX_CAPTIONS {
                let what = format!("has more than {MAX_CAPTIONS} captions of {name}");
                return Err(Error::data(path, what));
            }
            captions.push(caption);
        }
        for (picture, captions) in own {
            self.captions.entry(picture).or_insert(captions);
        }
        Ok(())
    }

    /// Returns the captions of a picture, listed with the ending of its name or without.
    pub fn of(&self, path: &Path) -> Option<&Vec<String>> {
        self.captions.get(path).or_else(|| self.captions.get(&path.with_extension("")))
    }
}

/// Resolves links in the folder of a path, and remembers that of each folder.
fn real(path: &Path, parents: &mut BTreeMap<PathBuf, PathBuf>) -> PathBuf {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return plain(path) };
    let resolved = || parent.canonicalize().unwrap_or_else(|_| plain(parent));
    parents.entry(parent.to_path_buf()).or_insert_with(resolved).join(name)
}

/// Resolves `.` and `..` by the letters.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            other => plain.push(other),
        }
    }
    plain
}

/// Reads one document, or one a line.
fn read_json(
    path: &Path,
    file: impl Read,
    field: Option<&str>,
    found: &mut Vec<Row>,
) -> Result<()> {
    let malformed = |error| Error::data(path, format!("is no list of captions in JSON: {error}"));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let by_name = name.ends_with(".json") && !name.ends_with(REFERENCE_LIST);
    let mut json = serde_json::Deserializer::from_reader(file);
    while json.end().is_err() {
        Rows { name: None, by_name, field, found }.deserialize(&mut json).map_err(malformed)?;
    }
    Ok(())
}

fn read_csv(path: &Path, file: impl Read, field: Option<&str>, found: &mut Vec<Row>) -> Result<()> {
    let malformed = |error| Error::data(path, format!("is no list of captions in CSV: {error}"));
    let mut csv = csv::Reader::from_reader(file);
    let headers = csv.headers().map_err(malformed)?.clone();
    let column = |rank: &dyn Fn(&str) -> Option<usize>| {
        let ranks = headers.iter().enumerate();
        let ranks = ranks.filter_map(|(place, name)| {
            Some((rank(name.trim().trim_start_matches('\u{feff}'))?, place))
        });
        ranks.min().map(|(_, place)| place)
    };
    let caption = column(&|name| rank_of_field(name, field));
    let (Some(name), Some(caption)) = (column(&rank_of_name), caption) else {
        let captions = field.map_or(FIELDS.join(", "), String::from);
        let what = format!(
            "has no columns of names and captions; its first line names one of {} and one of \
             {captions}",
            NAMES.join(", ")
        );
        return Err(Error::data(path, what));
    };
    let mut row = csv::StringRecord::new();
    while csv.read_record(&mut row).map_err(malformed)? {
        let text = |place: usize| row.get(place).unwrap_or_default().to_string();
        if row.as_slice().len() > MAX_CAPTION_BYTES {
            let what = format!("has a row of more than {MAX_CAPTION_BYTES} bytes");
            return Err(Error::data(path, what));
        }
        found.push((text(name), text(caption)));
    }
    Ok(())
}
