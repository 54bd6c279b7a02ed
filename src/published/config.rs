//! `config.json` of a class's folder.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files::contents::no_json;
use crate::files::safetensors::refuse_pickles_beside;
use crate::settings::{self, Settings};

const FILE_NAME: &str = "config.json";
/// Longest `config.json`, twenty times any published one.
const MAX_BYTES: u64 = 64 << 10;

/// A part of a pipeline, as messages call it.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Without an article: `autoencoder`.
    pub noun: &'static str,
    /// Its folder in that of a pipeline.
    pub folder: &'static str,
    /// Name of its weights' file without the extension.
    pub stem: &'static str,
}

/// The fields of a `config.json`.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Config {
    /// Reads the `config.json` of a part's folder.
    ///
    /// # Errors
    /// [`Error::Data`] if the file is missing, too long or no JSON object;
    /// [`Error::CheckpointMismatch`] if the weights beside it are a pickle.
    pub fn read(folder: &Path, part: Part) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        let text =
            text_of(&path).map_err(|error| Error::data(folder, no_config(folder, part, &error)))?;
        refuse_pickles_beside(folder, part.stem)?;
        Self::parsed(path, &text)
    }

    /// Reads a file that stands alone, without weights beside it.
    ///
    /// # Errors
    /// [`Error::Data`] if the file cannot be read, is too long or no JSON object.
    pub fn open(path: &Path) -> Result<Self> {
        let text = text_of(path).map_err(|error| Error::data(path, error.to_string()))?;
        Self::parsed(path.into(), &text)
    }

    fn parsed(path: PathBuf, text: &[u8]) -> Result<Self> {
        if text.len() as u64 > MAX_BYTES {
            let what = format!("is longer than the {MAX_BYTES} bytes allowed");
            return Err(Error::data(&path, what));
        }
        let parsed: Result<Map<String, Value>, _> = serde_json::from_slice(text);
        let fields = parsed.map_err(|error| Error::data(&path, no_json(text, &error)))?;
        Ok(Config { path, fields })
    }

    /// `path`: the file of the fields, for messages.
    pub fn new(path: &Path, fields: Map<String, Value>) -> Self {
        Config { path: path.into(), fields }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The text that a field holds; `None` if it is missing or no text.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.fields.get(field).and_then(Value::as_str)
    }

    /// The same file with other fields.
    pub fn with_fields(self, fields: Map<String, Value>) -> Self {
        Config { fields, ..self }
    }

    /// Reads the fields into a class's settings. One that is missing or null leaves its default.
    ///
    /// # Errors
    /// [`Error::Config`] naming every field that is unknown or has an unsupported value.
    pub fn read_into(&self, settings: &mut dyn Settings) -> Result<()> {
        settings::read_json(settings, &self.path.display().to_string(), &self.fields)
    }

    /// The error that the file is wrong in this.
    pub fn refused(&self, what: impl Into<String>) -> Error {
        Error::data(&self.path, what)
    }
}

/// The first bytes of a file, one more than allowed if it is longer.
fn text_of(path: &Path) -> io::Result<Vec<u8>> {
    // Checked before opening: opening a FIFO would block.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    let mut text = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    Ok(text)
}

/// The reason why a folder has no readable `config.json`, with the folder that was probably meant.
fn no_config(folder: &Path, part: Part, error: &io::Error) -> String {
    let inside = folder.join(part.folder);
    if inside.join(FILE_NAME).is_file() {
        return format!("is no {}'s folder; did you mean {}?", part.noun, inside.display());
    }
    format!("{FILE_NAME} of the {} cannot be read: {error}", part.noun)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: Part = Part { noun: "text encoder", folder: "text_encoder", stem: "model" };

    #[test]
    fn a_configuration_that_is_no_file_or_no_object_is_told() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join(FILE_NAME);
        let said = || Config::read(root.path(), PART).expect_err("no object").to_string();
        fs::write(&path, "[]").expect("a file");
        assert!(said().starts_with(&format!("{}: ", path.display())), "{}", said());
        fs::remove_file(&path).expect("a file");
        fs::create_dir(&path).expect("a folder");
        let what = "config.json of the text encoder cannot be read: is not a regular file";
        assert!(said().ends_with(what), "{}", said());
    }
}
