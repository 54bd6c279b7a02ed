//! Files that gzip compressed. They are inflated into memory up to a limit, so that a small file
//! cannot fill the machine.
//!
//! Source: RFC 1952, section 2.3.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use flate2::bufread::GzDecoder;

use crate::error::{Error, Result};

const MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Most bytes that a file inflates to: twice the longest text that a trainer caches, 512 tokens of
/// 15360 float32 numbers.
const MAX_BYTES: u64 = 64 << 20;
/// The length of the contents ends the file.
const LENGTH_BYTES: usize = 4;

/// True if the file begins as gzip's files do.
pub(super) fn is_compressed(file: &File) -> bool {
    let mut begin = [0; MAGIC.len()];
    file.read_exact_at(&mut begin, 0).is_ok() && begin == MAGIC
}

/// Returns the contents of a file of `bytes` bytes.
///
/// # Errors
/// [`Error::Data`] if it is damaged, or its contents are longer than the limit or than it says.
pub(super) fn inflated(path: &Path, file: &File, bytes: u64) -> Result<Vec<u8>> {
    let damaged = |_| Error::data(path, "is compressed by gzip, and cut or damaged");
    let mut length = [0; LENGTH_BYTES];
    let place = bytes.saturating_sub(LENGTH_BYTES as u64);
    file.read_exact_at(&mut length, place).map_err(damaged)?;
    let length = u64::from(u32::from_le_bytes(length));
    if length > MAX_BYTES {
        let what = format!(
            "is compressed by gzip and inflates to {length} bytes; at most {MAX_BYTES} are read"
        );
        return Err(Error::data(path, what));
    }
    let mut contents = Vec::with_capacity(length as usize);
    // Longer contents than it says are a lie, which the decoder itself would meet at their end
    // only.
    let mut decoder = GzDecoder::new(BufReader::new(file)).take(length + 1);
    decoder.read_to_end(&mut contents).map_err(damaged)?;
    if contents.len() as u64 != length {
        let what = format!("is compressed by gzip, and is not the {length} bytes that it says");
        return Err(Error::data(path, what));
    }
    Ok(contents)
}
