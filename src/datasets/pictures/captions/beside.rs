//! Captions in files beside their pictures.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::Path;

use serde::de::DeserializeSeed;

use super::MAX_CAPTION_BYTES;
use super::rows::Rows;
use crate::error::{Error, Result};
use crate::files::safetensors::open_error;

/// Longest JSON file of one picture.
const MAX_JSON_BYTES: u64 = 4 << 20;
/// Mark with which some editors begin a text in UTF-8.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Returns the captions in `<stem>.txt`, else in `<stem>.json`; `None` if neither is there or the
/// latter has none.
///
/// # Errors
/// [`Error::Data`] if such a file is too long or malformed; [`Error::Storage`].
pub fn caption_beside(stem: &Path, field: Option<&str>) -> Result<Option<Vec<String>>> {
    let with_ending = |ending: &str| {
        let mut path = stem.as_os_str().to_os_string();
        path.push(ending);
        std::path::PathBuf::from(path)
    };
    let text = with_ending(".txt");
    if text.exists() {
        return read_text(&text).map(|text| Some(vec![text]));
    }
    let json = with_ending(".json");
    match json.exists() {
        true => read_json(&json, field).map(|found| Some(found).filter(|found| !found.is_empty())),
        false => Ok(None),
    }
}

/// Opens a regular file of at most so many bytes.
fn open(path: &Path, most: u64) -> Result<File> {
    let found = fs::metadata(path).map_err(|error| open_error(path, error))?;
    if !found.is_file() || found.len() > most {
        let what = format!("is no file of at most {most} bytes, as captions are");
        return Err(Error::data(path, what));
    }
    File::open(path).map_err(|error| open_error(path, error))
}

fn read_text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let file = open(path, MAX_CAPTION_BYTES as u64)?;
    let read = file.take(MAX_CAPTION_BYTES as u64).read_to_end(&mut bytes);
    read.map_err(Error::storage(path, "read"))?;
    let text = String::from_utf8(bytes).map_err(|_| Error::data(path, "is no text in UTF-8"))?;
    Ok(text.trim_start_matches(BYTE_ORDER_MARK).trim().to_string())
}

fn read_json(path: &Path, field: Option<&str>) -> Result<Vec<String>> {
    let file = BufReader::new(open(path, MAX_JSON_BYTES)?);
    let mut found = Vec::new();
    let rows = Rows { name: Some(String::new()), by_name: false, field, found: &mut found };
    let mut json = serde_json::Deserializer::from_reader(file);
    let read = rows.deserialize(&mut json).and_then(|()| json.end());
    read.map_err(|error| Error::data(path, format!("holds no captions in JSON: {error}")))?;
    Ok(found.into_iter().map(|(_, caption)| caption).collect())
}
