//! SHA-256 of written data, so that writing and hashing a file take one pass.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Bytes that are written and then hashed while they are in the cache.
const PIECE_BYTES: usize = 256 << 10;

/// A writer that counts and hashes the bytes that it passes on.
pub struct HashingWriter<W> {
    inner: W,
    sha256: Sha256,
    bytes: u64,
}

impl<W: Write> HashingWriter<W> {
    pub fn new(inner: W) -> Self {
        HashingWriter { inner, sha256: Sha256::new(), bytes: 0 }
    }

    /// Returns the inner writer, the hash in lower-case hex and the number of bytes. It does not
    /// flush or sync.
    pub fn finish(self) -> (W, String, u64) {
        (self.inner, hex(self.sha256), self.bytes)
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        // Only the bytes that the inner writer took are hashed: after a short write the caller
        // sends the rest again.
        let taken = self.inner.write(&buffer[..buffer.len().min(PIECE_BYTES)])?;
        self.sha256.update(&buffer[..taken]);
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Returns the hash of a whole file as hex digits.
///
/// # Errors
/// [`Error::Storage`] if it cannot be read.
pub fn of_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::storage(path, "open"))?;
    let mut writer = HashingWriter::new(io::sink());
    io::copy(&mut file, &mut writer).map_err(Error::storage(path, "read"))?;
    Ok(writer.finish().1)
}

/// Returns a finished hash as 64 lower-case hex digits.
pub fn hex(sha256: Sha256) -> String {
    digits(&sha256.finalize())
}

/// Returns bytes as lower-case hex digits, two each.
pub fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes three bytes in each call, as a full pipe might.
    struct ShortWrites(Vec<u8>);

    impl Write for ShortWrites {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            let taken = buffer.len().min(3);
            self.0.extend_from_slice(&buffer[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_hash_is_of_the_bytes_that_arrived() {
        let mut writer = HashingWriter::new(ShortWrites(Vec::new()));
        writer
            .write_all(b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")
            .expect("a vector takes all");
        let (inner, sha256, bytes) = writer.finish();
        // Source: FIPS 180-4, the example of two blocks.
        assert_eq!(sha256, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
        assert_eq!((bytes, inner.0.len()), (56, 56));
    }
}
