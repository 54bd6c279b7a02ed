//! Whether a folder is a checkpoint, to the last bit.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;

use serde::Deserialize;

use super::{FORMAT, MANIFEST, Manifest, Part, VERSION};
use crate::data::sha256::HashingWriter;
use crate::error::{Error, Result};

/// Why a folder cannot be used as a checkpoint.
#[derive(Debug)]
pub enum Unfit {
    /// It is not what was written; one before it may be.
    Corrupt { file: String, what: String },
    /// Nothing is wrong with it that another checkpoint would mend: another program's, or a disk that cannot be read.
    Other(Error),
}

impl Unfit {
    fn corrupt(file: &str, what: impl Into<String>) -> Self {
        Unfit::Corrupt { file: file.into(), what: what.into() }
    }

    /// As what ends a program that needs this very checkpoint.
    pub fn into_error(self, folder: &Path) -> Error {
        match self {
            Unfit::Corrupt { file, what } => Error::checkpoint_mismatch(folder.join(file), what),
            Unfit::Other(error) => error,
        }
    }
}

/// What every version of the format says of itself.
#[derive(Deserialize)]
struct Version {
    format: String,
    version: u64,
}

/// Reads the manifest and compares it and every part with the sizes and hashes it says.
///
/// # Errors
/// The first file at fault.
pub fn verify(folder: &Path) -> Result<Manifest, Unfit> {
    let manifest = read(folder)?;
    for part in &manifest.parts {
        verify_part(folder, part)?;
    }
    Ok(manifest)
}

/// The manifest alone.
///
/// # Errors
/// [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn manifest(folder: &Path) -> Result<Manifest> {
    read(folder).map_err(|unfit| unfit.into_error(folder))
}

fn read(folder: &Path) -> Result<Manifest, Unfit> {
    let broken = |what: String| Unfit::corrupt(MANIFEST, what);
    let path = folder.join(MANIFEST);
    let text = fs::read(&path).map_err(|error| unreadable(&path, MANIFEST, error))?;
    let said: Version = serde_json::from_slice(&text).map_err(|error| broken(format!("is no manifest: {error}")))?;
    if said.format != FORMAT || said.version != VERSION {
        let what = format!("is {:?} version {}, this program reads {FORMAT:?} version {VERSION}", said.format, said.version);
        return Err(Unfit::Other(Error::checkpoint_mismatch(path, what)));
    }
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| broken(format!("is no manifest: {error}")))?;
    if manifest.sha256 != manifest.digest() {
        return Err(broken("sha256 differs".into()));
    }
    Ok(manifest)
}

fn verify_part(folder: &Path, part: &Part) -> Result<(), Unfit> {
    let (path, broken) = (folder.join(&part.file), |what: String| Unfit::corrupt(&part.file, what));
    if Path::new(&part.file).components().count() != 1 {
        return Err(broken("leaves the checkpoint's folder".into()));
    }
    let unreadable = |error| unreadable(&path, &part.file, error);
    let bytes = fs::metadata(&path).map_err(unreadable)?.len();
    if bytes != part.bytes {
        return Err(broken(format!("has {bytes} of {} bytes", part.bytes)));
    }
    let mut hashing = HashingWriter::new(io::sink());
    File::open(&path).and_then(|mut file| io::copy(&mut file, &mut hashing)).map_err(unreadable)?;
    let (_, sha256, _) = hashing.finish();
    if sha256 == part.sha256 { Ok(()) } else { Err(broken("sha256 differs".into())) }
}

/// What is missing or lies on a bad sector is lost; what may not be read now may be read later.
fn unreadable(path: &Path, file: &str, error: io::Error) -> Unfit {
    let lost = error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
    if lost { Unfit::corrupt(file, format!("cannot be read: {error}")) } else { Unfit::Other(Error::storage(path, "read")(error)) }
}
