//! Texts that commands read and write.

use std::io::{self, Write};
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::contents::{Format, HEAD_BYTES, recognized};

/// Reads a TOML file that `flag` names.
pub fn read_text(path: &Path, flag: &str) -> Result<String> {
    let refused = |what: String| Error::config(flag, format!("{} {what}", path.display()));
    if path.is_dir() {
        return Err(refused("is a folder; expected a TOML file".into()));
    }
    let bytes = std::fs::read(path).map_err(|error| refused(format!("cannot be read: {error}")))?;
    match recognized(&bytes[..bytes.len().min(HEAD_BYTES)], Format::Toml) {
        Some(what) => Err(refused(what)),
        None => String::from_utf8(bytes)
            .map_err(|error| refused(format!("is no text: {}", error.utf8_error()))),
    }
}

/// Writes to standard output; a reader that has closed the pipe is no error.
pub fn say(text: &str) -> Result<i32> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::storage("standard output", "write to")(error))
        }
        _ => Ok(0),
    }
}
