//! The zip archive around a pickle. It is untrusted: entries must be stored as they are, so that no
//! archive grows when it is read, and together they are no longer than the file.
//!
//! Source: PKWARE's APPNOTE 6.3.10, sections 4.3.7 to 4.3.16.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::Region;
use crate::error::{Error, Result};
use crate::files::contents::{Format, HEAD_BYTES, recognized};

/// Longest directory that is read, and the number of its entries.
const MAX_DIRECTORY_BYTES: u64 = 4 << 20;
const MAX_ENTRIES: u64 = 65_536;
/// Value of a 32-bit field whose number stands in a 64-bit one.
const IN_64_BITS: u64 = 0xffff_ffff;

const END: u32 = 0x0605_4b50;
const END_BYTES: u64 = 22;
const END_64: u32 = 0x0606_4b50;
const END_64_BYTES: u64 = 56;
const LOCATOR: u32 = 0x0706_4b50;
const LOCATOR_BYTES: u64 = 20;
const DIRECTORY_ENTRY: u32 = 0x0201_4b50;
const DIRECTORY_ENTRY_BYTES: usize = 46;
const LOCAL: u32 = 0x0403_4b50;
const LOCAL_BYTES: u64 = 30;
const ENCRYPTED: u64 = 1;

/// The bytes of an archive.
#[derive(Debug)]
pub(super) enum Bytes {
    /// A part of a file.
    Part(File, Region),
    /// What a compressed file held.
    Inflated(Vec<u8>),
}

impl Bytes {
    fn length(&self) -> u64 {
        match self {
            Bytes::Part(_, region) => region.bytes,
            Bytes::Inflated(bytes) => bytes.len() as u64,
        }
    }

    /// Fills `buffer` with the bytes from `start` on, which are within the length.
    fn read_exact_at(&self, buffer: &mut [u8], start: u64) -> io::Result<()> {
        match self {
            Bytes::Part(file, region) => file.read_exact_at(buffer, region.start + start),
            Bytes::Inflated(bytes) => {
                let from = start as usize;
                buffer.copy_from_slice(&bytes[from..from + buffer.len()]);
                Ok(())
            }
        }
    }
}

/// An archive whose directory has been read.
#[derive(Debug)]
pub(super) struct Archive {
    path: PathBuf,
    bytes: Bytes,
    entries: BTreeMap<String, Entry>,
}

/// One stored file of an archive.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// First byte of its local header, counted from the archive's first byte.
    local: u64,
    pub bytes: u64,
    crc32: u32,
}

/// Place and size of the directory.
struct Directory {
    start: u64,
    bytes: u64,
    entries: u64,
}

impl Archive {
    /// Reads the archive's directory.
    ///
    /// # Errors
    /// [`Error::Data`] if there is no archive, or its directory contradicts itself or the file.
    pub fn open(path: &Path, bytes: Bytes) -> Result<Self> {
        let mut archive = Archive { path: path.into(), bytes, entries: BTreeMap::new() };
        let directory = archive.directory()?;
        let mut text = vec![0; directory.bytes as usize];
        archive.read_at(&mut text, directory.start)?;
        archive.entries = entries(&text, &directory, archive.bytes.length())
            .map_err(|what| archive.refused(what))?;
        Ok(archive)
    }

    /// Returns the folder that holds `data.pkl`, and everything else with it.
    pub fn stem(&self) -> Result<String, String> {
        let of_pickle = |name: &&str| !name.contains('/');
        let stems = self.entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
        let stems: Vec<&str> = stems.filter(of_pickle).collect();
        match stems[..] {
            [stem] => Ok(stem.into()),
            _ => Err(format!(
                "is a zip archive with {} entries `<name>/data.pkl`; expected the one that torch.save writes",
                stems.len()
            )),
        }
    }

    pub fn find(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Returns a short entry's bytes.
    pub fn read(&self, entry: &Entry, max_bytes: u64) -> Result<Vec<u8>> {
        if entry.bytes > max_bytes {
            let what = format!(
                "holds an entry of {} bytes where at most {max_bytes} are allowed",
                entry.bytes
            );
            return Err(self.refused(what));
        }
        let mut data = vec![0; entry.bytes as usize];
        self.read_into(entry, &mut data)?;
        Ok(data)
    }

    /// Fills `data`, as long as the entry, and compares it with the entry's checksum.
    pub fn read_into(&self, entry: &Entry, data: &mut [u8]) -> Result<()> {
        let mut header = [0; LOCAL_BYTES as usize];
        self.read_at(&mut header, entry.local)?;
        if number(&header, 0, 4) != Some(u64::from(LOCAL)) {
            return Err(self.refused("has an entry that does not begin where its directory says"));
        }
        let names = [26, 28].map(|at| number(&header, at, 2).expect("within the header"));
        let start = entry.local + LOCAL_BYTES + names[0] + names[1];
        self.read_at(data, start)?;
        if crc32fast::hash(data) != entry.crc32 {
            return Err(self.refused("is damaged: the checksum of one of its entries differs"));
        }
        Ok(())
    }

    fn directory(&self) -> Result<Directory> {
        let Some(end_start) = self.bytes.length().checked_sub(END_BYTES) else {
            return Err(self.no_archive());
        };
        let mut end = [0; END_BYTES as usize];
        self.read_at(&mut end, end_start)?;
        if number(&end, 0, 4) != Some(u64::from(END)) {
            return Err(self.no_archive());
        }
        let field = |at, width| number(&end, at, width).expect("within the record");
        let mut found =
            Directory { entries: field(10, 2), bytes: field(12, 4), start: field(16, 4) };
        if found.entries == 0xffff || found.bytes == IN_64_BITS || found.start == IN_64_BITS {
            found = self.directory_64(end_start)?;
        }
        let inside = found.start.checked_add(found.bytes).is_some_and(|last| last <= end_start);
        if !inside || found.bytes > MAX_DIRECTORY_BYTES || found.entries > MAX_ENTRIES {
            let Directory { start, bytes, entries } = found;
            let what = format!(
                "has a zip directory of {entries} entries in {bytes} bytes at byte {start}; \
                 expected at most {MAX_ENTRIES} in {MAX_DIRECTORY_BYTES} bytes of the file"
            );
            return Err(self.refused(what));
        }
        Ok(found)
    }

    /// Reads the directory's place from the records for large archives.
    fn directory_64(&self, end_start: u64) -> Result<Directory> {
        let lost = || self.refused("has a zip directory that cannot be found");
        let mut locator = [0; LOCATOR_BYTES as usize];
        let start = end_start.checked_sub(LOCATOR_BYTES).ok_or_else(lost)?;
        self.read_at(&mut locator, start)?;
        let at = number(&locator, 8, 8).filter(|at| {
            number(&locator, 0, 4) == Some(u64::from(LOCATOR))
                && at.checked_add(END_64_BYTES).is_some_and(|end| end <= start)
        });
        let mut end = [0; END_64_BYTES as usize];
        self.read_at(&mut end, at.ok_or_else(lost)?)?;
        if number(&end, 0, 4) != Some(u64::from(END_64)) {
            return Err(lost());
        }
        let field = |at| number(&end, at, 8).expect("within the record");
        Ok(Directory { entries: field(32), bytes: field(40), start: field(48) })
    }

    fn read_at(&self, buffer: &mut [u8], start: u64) -> Result<()> {
        let end = start.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.bytes.length()) {
            return Err(self.refused("has an entry that reaches beyond its end; it may be cut"));
        }
        self.bytes.read_exact_at(buffer, start).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.refused("has been cut since it was opened"),
            _ => Error::storage(&self.path, "read")(error),
        })
    }

    fn no_archive(&self) -> Error {
        let mut head = vec![0; (HEAD_BYTES as u64).min(self.bytes.length()) as usize];
        let read = self.bytes.read_exact_at(&mut head, 0);
        let what = match read {
            Ok(()) if head.starts_with(b"PK\x03\x04") => {
                "is a zip archive without its directory: it was cut, or is still being written"
            }
            Ok(()) if head.starts_with(b"\x80\x02") => {
                "is a bare pickle, or one of torch before 1.6; save it again by today's torch.save"
            }
            Ok(()) => match recognized(&head, Format::Archive) {
                Some(what) => return self.refused(what),
                None => "is no archive that torch.save writes",
            },
            Err(error) => return Error::storage(&self.path, "read")(error),
        };
        self.refused(what)
    }

    fn refused(&self, what: impl Into<String>) -> Error {
        Error::data(&self.path, what)
    }
}

/// Returns the entries of a directory by name.
fn entries(
    text: &[u8],
    directory: &Directory,
    archive_bytes: u64,
) -> Result<BTreeMap<String, Entry>, String> {
    let (mut rest, mut found, mut total) = (text, BTreeMap::new(), 0u64);
    for _ in 0..directory.entries {
        let (name, entry, after) = entry(rest)?;
        total = total.saturating_add(entry.bytes);
        if total > archive_bytes {
            return Err("holds entries that are longer than the file together".into());
        }
        if found.insert(name.clone(), entry).is_some() {
            return Err(format!("holds two entries `{name}`"));
        }
        rest = after;
    }
    Ok(found)
}

/// Splits the first entry off a directory.
fn entry(text: &[u8]) -> Result<(String, Entry, &[u8]), String> {
    let cut = || "has a zip directory that ends within an entry".to_string();
    let field = |at, width| number(text, at, width).ok_or_else(cut);
    if field(0, 4)? != u64::from(DIRECTORY_ENTRY) {
        return Err("has a zip directory that is damaged".into());
    }
    let (flags, method, crc32) = (field(8, 2)?, field(10, 2)?, field(16, 4)? as u32);
    let lengths = [field(28, 2)?, field(30, 2)?, field(32, 2)?].map(|length| length as usize);
    let after_name = DIRECTORY_ENTRY_BYTES + lengths[0];
    let after_extra = after_name + lengths[1];
    let name = text.get(DIRECTORY_ENTRY_BYTES..after_name).ok_or_else(cut)?;
    let extra = text.get(after_name..after_extra).ok_or_else(cut)?;
    let after = text.get(after_extra + lengths[2]..).ok_or_else(cut)?;
    let name = std::str::from_utf8(name).map_err(|_| "has an entry whose name is no text")?;
    if flags & ENCRYPTED != 0 || method != 0 {
        return Err(format!(
            "holds a compressed or encrypted entry `{name}`; torch.save stores entries as they are"
        ));
    }
    let mut wide = Wide::new(extra);
    let mut size = |at| wide.widened(field(at, 4)?);
    let (bytes, stored, local) = (size(24)?, size(20)?, size(42)?);
    if bytes != stored {
        return Err(format!("has an entry `{name}` of two sizes, {stored} and {bytes}"));
    }
    Ok((name.into(), Entry { local, bytes, crc32 }, after))
}

/// The 64-bit numbers of an entry, which stand for 32-bit ones in their order.
struct Wide<'e> {
    numbers: &'e [u8],
}

impl<'e> Wide<'e> {
    fn new(mut extra: &'e [u8]) -> Self {
        while let (Some(id), Some(length)) = (number(extra, 0, 2), number(extra, 2, 2)) {
            let Some(field) = extra.get(4..4 + length as usize) else { break };
            if id == 1 {
                return Wide { numbers: field };
            }
            extra = &extra[4 + length as usize..];
        }
        Wide { numbers: &[] }
    }

    fn widened(&mut self, narrow: u64) -> Result<u64, String> {
        if narrow != IN_64_BITS {
            return Ok(narrow);
        }
        let wide = number(self.numbers, 0, 8).ok_or("has an entry without its 64-bit size")?;
        self.numbers = &self.numbers[8..];
        Ok(wide)
    }
}

/// Returns the little-endian number of `width` bytes at `at`, if the bytes reach so far.
fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let field = bytes.get(at..at + width)?;
    Some(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}
