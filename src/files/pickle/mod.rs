//! Reads files that `torch.save` wrote, without running them: the pickle inside is parsed by a
//! machine that knows a few opcodes, the storages of `torch` and the functions that rebuild
//! tensors, and refuses everything else.
//!
//! Such a file is a zip archive: `<stem>/data.pkl` describes the object, `<stem>/data/<key>` holds
//! the plain little-endian data of a storage. The archive must be stored without compression, as
//! `torch.save` writes it; the file as a whole may be compressed by gzip.
//!
//! | question | file |
//! |---|---|
//! | a compressed file | `gzip.rs` |
//! | entries of the archive | `archive.rs` |
//! | opcodes | `machine.rs` |
//! | names that a pickle may use | `torch.rs` |
//! | the object that comes out | `value.rs` |

mod archive;
mod gzip;
mod machine;
mod torch;
mod value;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::safetensors::open_error;
use crate::error::{Error, Result};
use crate::tensor::bytes_mut;
use archive::{Archive, Bytes};
use machine::Machine;
pub use torch::PickledTensor;
pub use value::Value;

/// Longest description of an object that is parsed; a real one takes about 100 bytes a tensor.
const MAX_PICKLE_BYTES: u64 = 4 << 20;
/// Largest storage that is read (1 TiB).
const MAX_STORAGE_BYTES: u64 = 1 << 40;

/// A file of `torch.save` whose object has been parsed; the tensors are read on demand.
#[derive(Debug)]
pub struct PickledFile {
    path: PathBuf,
    archive: Archive,
    /// Folder of the archive that holds all its entries.
    stem: String,
    root: Value,
}

/// A part of a file that holds one whole archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Region {
    pub start: u64,
    pub bytes: u64,
}

impl PickledFile {
    /// Opens a regular file and parses its object, but reads no tensor; a file that gzip compressed
    /// is inflated into memory.
    ///
    /// # Errors
    /// [`Error::Data`] with the reason if the file is missing, not a regular file, no archive of
    /// `torch.save`, too large when inflated, or uses an opcode or a name that files of tensors do
    /// not need; [`Error::Storage`] if it cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (file, bytes) = open_regular(path)?;
        let bytes = match gzip::is_compressed(&file) {
            true => Bytes::Inflated(gzip::inflated(path, &file, bytes)?),
            false => Bytes::Part(file, Region { start: 0, bytes }),
        };
        PickledFile::parse(path, bytes)
    }

    /// Opens an archive that is a part of a file, as databases of many archives hold it.
    ///
    /// # Errors
    /// Errors of [`open`](Self::open); [`Error::Data`] if the part reaches beyond the file's end.
    pub fn open_region(path: impl AsRef<Path>, region: Region) -> Result<Self> {
        let path = path.as_ref();
        let (file, bytes) = open_regular(path)?;
        let end = region.start.checked_add(region.bytes).filter(|end| *end <= bytes);
        if end.is_none() {
            let Region { start, bytes: length } = region;
            let what = format!(
                "has {bytes} bytes; a record of {length} bytes from byte {start} on does not fit"
            );
            return Err(Error::data(path, what));
        }
        PickledFile::parse(path, Bytes::Part(file, region))
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<Self> {
        let archive = Archive::open(path, bytes)?;
        let refused = |what: String| Error::data(path, what);
        let stem = archive.stem().map_err(refused)?;
        if let Some(order) = archive.find(&format!("{stem}/byteorder")) {
            let order = archive.read(order, 16)?;
            if order != b"little" {
                return Err(refused(
                    "holds big-endian numbers; expected little-endian ones".into(),
                ));
            }
        }
        let entry = archive.find(&format!("{stem}/data.pkl")).expect("the stem is this entry's");
        let pickle = archive.read(entry, MAX_PICKLE_BYTES)?;
        let storage_bytes =
            |key: &str| archive.find(&format!("{stem}/data/{key}")).map(|entry| entry.bytes);
        let root = Machine::new(&pickle, &storage_bytes).run().map_err(refused)?;
        Ok(PickledFile { path: path.into(), archive, stem, root })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the object that was saved.
    pub fn root(&self) -> &Value {
        &self.root
    }

    /// Returns one tensor, on the CPU, after comparing its storage with the archive's checksum.
    ///
    /// # Errors
    /// [`Error::Data`] if the storage is damaged or memory is lacking; [`Error::Storage`] if it
    /// cannot be read.
    pub fn read(&self, tensor: &PickledTensor) -> Result<Tensor> {
        let refused = |what: String| Error::data(&self.path, what);
        let entry = self.archive.find(&format!("{}/data/{}", self.stem, tensor.storage));
        let entry = entry.ok_or_else(|| refused("a tensor of another file".into()))?;
        let elements = entry.bytes / tensor.kind.elt_size_in_bytes() as u64;
        let storage = (entry.bytes <= MAX_STORAGE_BYTES)
            .then(|| Tensor::f_empty([elements as i64], (tensor.kind, Device::Cpu)).ok());
        let Some(mut storage) = storage.flatten() else {
            return Err(refused(format!("cannot hold {} bytes of it in memory", entry.bytes)));
        };
        let data = bytes_mut(&mut storage);
        self.archive.read_into(entry, data)?;
        // Any other byte in a boolean is undefined behaviour inside libtorch.
        if tensor.kind == Kind::Bool && data.iter().any(|byte| *byte > 1) {
            return Err(refused("holds a boolean that is neither 0 nor 1".into()));
        }
        Ok(storage.as_strided(&tensor.shape, &tensor.strides, tensor.offset).contiguous())
    }
}

/// Opens a regular file; returns its length too. Opening a FIFO would block, and opening a device
/// may have side effects, so the kind is checked first.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    let found = fs::metadata(path).map_err(|error| open_error(path, error))?;
    if !found.is_file() {
        return Err(Error::data(
            path,
            if found.is_dir() { "is a folder, not a file" } else { "is not a regular file" },
        ));
    }
    let file = File::open(path).map_err(|error| open_error(path, error))?;
    let bytes = file.metadata().map_err(Error::storage(path, "inspect"))?.len();
    Ok((file, bytes))
}
