//! A strict reader and writer of the safetensors format: names and shapes in JSON, then plain
//! little-endian data.
//!
//! The format's own crate accepts duplicate names, path-like names, unknown fields and headers that
//! cost gigabytes; this reader refuses them. It reads by position and never maps a file, so that a
//! file truncated while in use causes an error and not a SIGBUS.
//!
//! Source: <https://github.com/huggingface/safetensors>, section "Format" of its README.

mod header;
mod shards;
mod source;
mod write;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::contents::{Format, HEAD_BYTES, recognized};
use crate::error::{Error, Result};
use crate::tensor::bytes_mut;
pub use header::TensorInfo;
pub(crate) use header::{Content, is_eight_bits};
pub use shards::Shards;
pub(crate) use source::open_error;
use source::{Opened, Source};
pub use source::{refuse_pickled_data, refuse_pickled_weights, refuse_pickles_beside};
pub use write::{Planned, Writer, write};

#[cfg(target_endian = "big")]
compile_error!("the format is little-endian and tensors are read as they lie in memory");

/// File name of diffusers' weights without its extension.
pub const WEIGHTS_STEM: &str = "diffusion_pytorch_model";
/// Bytes of the field with the header's length.
const PREFIX: u64 = 8;
/// Largest tensor that is allocated (1 TiB): some systems grant any amount and kill the process
/// when it is used.
const MAX_READ_BYTES: u64 = 1 << 40;
/// Bytes that are read at once to be checked; they fit into a core's second-level cache.
const CACHED_BYTES: usize = 256 << 10;
/// Bytes that are read at once from a file that is hashed.
const PIECE_BYTES: u64 = 1 << 20;

/// An open safetensors file whose header has been checked; the data are read on demand.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    source: Source,
    file_bytes: u64,
    data_start: u64,
    tensors: Vec<TensorInfo>,
    by_name: BTreeMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl SafeTensors {
    /// Opens a regular file and checks its header, but not its data.
    ///
    /// # Errors
    /// [`Error::Data`] with the reason if the file is missing, a pickle, not a regular file, or has
    /// a malformed header; [`Error::Storage`] if it cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        SafeTensors::open_as(path, Content::Tensors)
    }

    /// As [`open`](Self::open), for a file of weights, a dataset or a cache, which may hold more.
    pub(crate) fn open_as(path: impl AsRef<Path>, content: Content) -> Result<Self> {
        let path = path.as_ref();
        if matches!(content, Content::Samples | Content::Cache) {
            refuse_pickled_data(path)?;
        }
        let (source, file_bytes) = Source::open(path)?;
        SafeTensors::from_source(path.into(), source, file_bytes, content)
    }

    /// Returns the same file, which is opened again for each read and holds no descriptor in
    /// between. A later read returns [`Error::Data`] if the path has another file by then.
    ///
    /// # Errors
    /// [`Error::Storage`] if the file cannot be inspected.
    pub fn on_demand(self) -> Result<Self> {
        let source = self.source.on_demand(&self.path)?;
        Ok(SafeTensors { source, ..self })
    }

    /// Reads samples from bytes that are part of the binary; `name` replaces the path in messages.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        let length = bytes.len() as u64;
        SafeTensors::from_source(name.into(), Source::Embedded(bytes), length, Content::Samples)
    }

    fn from_source(
        path: PathBuf,
        source: Source,
        file_bytes: u64,
        content: Content,
    ) -> Result<Self> {
        let by_name = BTreeMap::new();
        let mut file = SafeTensors {
            path,
            source,
            file_bytes,
            data_start: 0,
            tensors: Vec::new(),
            by_name,
            metadata: BTreeMap::new(),
        };
        let (header, data_start) =
            file.header(content).map_err(|error| file.explained(error, content))?;
        file.data_start = data_start;
        file.by_name =
            header.tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        file.tensors = header.tensors;
        file.metadata = header.metadata;
        Ok(file)
    }

    /// Returns the same file, read as if each tensor had a first axis of length 1, except for those
    /// named: a file of one sample becomes one of many.
    pub(crate) fn with_one_row(mut self, except: &[&str]) -> Self {
        let others = self.tensors.iter_mut().filter(|info| !except.contains(&info.name.as_str()));
        others.for_each(|info| info.shape.insert(0, 1));
        self
    }

    /// Returns the checked header, and the offset of the first byte after it.
    fn header(&self, content: Content) -> Result<(header::Header, u64)> {
        let file_bytes = self.file_bytes;
        let mut prefix = [0; PREFIX as usize];
        let Some(after_prefix) = file_bytes.checked_sub(PREFIX) else {
            return Err(self
                .refused(format!("is {file_bytes} bytes long, too short for a safetensors file")));
        };
        let opened = self.opened()?;
        self.read_at(&opened, &mut prefix, 0)?;
        let header_bytes = u64::from_le_bytes(prefix);
        header::check_length(header_bytes).map_err(|what| self.refused(what))?;
        let Some(data_bytes) = after_prefix.checked_sub(header_bytes) else {
            return Err(self.refused(format!(
                "header of {header_bytes} bytes does not fit the file's {file_bytes} bytes"
            )));
        };
        let mut text = vec![0; header_bytes as usize];
        self.read_at(&opened, &mut text, PREFIX)?;
        let header =
            header::parse(&text, data_bytes, content).map_err(|what| self.refused(what))?;
        Ok((header, PREFIX + header_bytes))
    }

    /// Returns the reason why a file has no sound header; a better one if its first bytes are those
    /// of another format.
    fn explained(&self, reason: Error, content: Content) -> Error {
        let expected = match content {
            Content::Tensors | Content::Weights => Format::SafeTensors,
            Content::Samples | Content::Cache => Format::Samples,
        };
        let mut head = vec![0; HEAD_BYTES.min(self.file_bytes as usize)];
        let read = self.opened().and_then(|opened| self.read_at(&opened, &mut head, 0));
        let recognized = read.ok().and_then(|()| recognized(&head, expected));
        recognized.map_or(reason, |what| self.refused(what))
    }

    /// Returns the path as given, or the name of an embedded file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the tensors of the file, in the order of their data.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    pub(crate) fn holds(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Returns kind, shape and offset of one tensor.
    ///
    /// # Errors
    /// [`Error::Data`] with the existing names.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.by_name.get(name).map(|&index| &self.tensors[index]).ok_or_else(|| {
            let names: Vec<&str> =
                self.tensors.iter().map(|tensor| tensor.name.as_str()).take(20).collect();
            let more = if names.len() < self.tensors.len() { ", …" } else { "" };
            self.refused(format!("holds no tensor `{name}`; it has {}{more}", names.join(", ")))
        })
    }

    /// Returns one whole tensor, on the CPU.
    ///
    /// # Errors
    /// [`Error::Data`] if there is no such tensor or the file was truncated since it was opened;
    /// [`Error::Storage`] if it cannot be read.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        let mut tensor = self.empty_tensor(&info.shape, info.kind)?;
        self.read_data(&self.opened()?, info, 0, bytes_mut(&mut tensor), &mut |_| ())?;
        Ok(tensor)
    }

    /// Returns rows of one tensor along its first axis, in the given order; adjacent rows are read
    /// together.
    ///
    /// # Shapes
    /// `rows` of a tensor `[N, …]` give `[rows.len(), …]`.
    /// # Errors
    /// As [`read`](Self::read).
    /// # Panics
    /// If there is no such row (a bug in the caller).
    pub fn read_rows(&self, name: &str, rows: &[u64]) -> Result<Tensor> {
        let info = self.info(name)?;
        let mut tensor = self.empty_tensor(&with_rows(info, rows.len()), info.kind)?;
        self.read_rows_into(info, rows, bytes_mut(&mut tensor), |_| ())?;
        Ok(tensor)
    }

    /// Fills `data` with exactly the bytes of `rows`. `look` gets all of them, chunk by chunk,
    /// while they are in a cache: a second pass over memory would take as long as the read.
    pub(crate) fn read_rows_into(
        &self,
        info: &TensorInfo,
        rows: &[u64],
        data: &mut [u8],
        mut look: impl FnMut(&[u8]),
    ) -> Result<()> {
        let (opened, row_bytes) = (self.opened()?, row_bytes(info));
        let mut rest = data;
        for run in rows.chunk_by(|a, b| a + 1 == *b) {
            let last = run[0] + run.len() as u64 - 1;
            assert!(last < info.shape[0] as u64, "row {last} of `{}` {:?}", info.name, info.shape);
            let (now, later) = rest.split_at_mut(run.len() * row_bytes as usize);
            self.read_data(&opened, info, run[0] * row_bytes, now, &mut look)?;
            rest = later;
        }
        Ok(())
    }

    /// Returns a buffer for data of the file, or an error if the machine lacks the memory: a sparse
    /// file may claim any size.
    pub(crate) fn buffer(&self, bytes: u64) -> Result<Vec<u8>> {
        let mut buffer = Vec::new();
        if bytes > MAX_READ_BYTES || buffer.try_reserve_exact(bytes as usize).is_err() {
            return Err(self.too_large(bytes));
        }
        buffer.resize(bytes as usize, 0);
        Ok(buffer)
    }

    /// Returns a tensor to be filled from the file, or an error if the machine lacks the memory.
    pub(crate) fn empty_tensor(&self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let bytes = shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64;
        let tensor =
            (bytes <= MAX_READ_BYTES).then(|| Tensor::f_empty(shape, (kind, Device::Cpu)).ok());
        tensor.flatten().ok_or_else(|| self.too_large(bytes))
    }

    /// Fills `data` from the tensor's byte `start`, as [`read_rows_into`](Self::read_rows_into)
    /// does.
    fn read_data(
        &self,
        opened: &Opened<'_>,
        info: &TensorInfo,
        start: u64,
        data: &mut [u8],
        look: &mut impl FnMut(&[u8]),
    ) -> Result<()> {
        let starts = (self.data_start + info.offset + start..).step_by(CACHED_BYTES);
        for (piece, start) in data.chunks_mut(CACHED_BYTES).zip(starts) {
            self.read_at(opened, piece, start)?;
            look(piece);
        }
        // Any other byte in a boolean is undefined behaviour inside libtorch.
        if info.kind == Kind::Bool && data.iter().any(|&byte| byte > 1) {
            return Err(self.refused(format!(
                "tensor `{}` is BOOL and holds bytes other than 0 and 1",
                info.name
            )));
        }
        Ok(())
    }

    /// Reads the file from its first to its last byte and passes each chunk to `piece`.
    pub(crate) fn for_each_piece(&self, mut piece: impl FnMut(&[u8])) -> Result<()> {
        let (opened, mut buffer) =
            (self.opened()?, vec![0; PIECE_BYTES.min(self.file_bytes) as usize]);
        for start in (0..self.file_bytes).step_by(PIECE_BYTES as usize) {
            let length = PIECE_BYTES.min(self.file_bytes - start) as usize;
            self.read_at(&opened, &mut buffer[..length], start)?;
            piece(&buffer[..length]);
        }
        Ok(())
    }

    fn opened(&self) -> Result<Opened<'_>> {
        self.source.opened(&self.path)
    }

    fn read_at(&self, opened: &Opened<'_>, buffer: &mut [u8], start: u64) -> Result<()> {
        opened.read_at(buffer, start).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => self.refused(format!(
                "was {} bytes long when it was opened and has been cut since",
                self.file_bytes
            )),
            _ => Error::storage(&self.path, "read")(e),
        })
    }

    fn too_large(&self, bytes: u64) -> Error {
        self.refused(format!("cannot hold {bytes} bytes of it in memory"))
    }

    fn refused(&self, what: impl Into<String>) -> Error {
        Error::data(&self.path, what)
    }
}

/// Returns the bytes of one row along the first axis.
pub(crate) fn row_bytes(info: &TensorInfo) -> u64 {
    assert!(!info.shape.is_empty(), "`{}` is a scalar and has no rows", info.name);
    info.bytes / info.shape[0] as u64
}

/// Returns the tensor's shape with another number of rows.
pub(crate) fn with_rows(info: &TensorInfo, rows: usize) -> Vec<i64> {
    [&[rows as i64], &info.shape[1..]].concat()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// Written by Python: `safetensors.torch.save({"t": torch.tensor([[1, 2], [3, 4]],
    /// dtype=torch.int16)}, {"by": "python"})`.
    const FROM_PYTHON: &[u8] = b"X\x00\x00\x00\x00\x00\x00\x00{\"__metadata__\":{\"by\":\"python\"},\"t\":{\"dtype\":\"I16\",\"shape\":[2,2],\"data_offsets\":[0,8]}} \x01\x00\x02\x00\x03\x00\x04\x00";

    fn saved(tensors: &[(&str, &Tensor)]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("saved.safetensors");
        let mut file = File::create(&path).expect("a new file");
        write(&mut file, tensors, &BTreeMap::from([("k".into(), "v".into())]))
            .expect("a sound file");
        (folder, path)
    }

    #[test]
    fn a_file_of_the_python_package_is_read() {
        let file =
            SafeTensors::from_static("python.safetensors", FROM_PYTHON).expect("a sound file");
        assert_eq!(file.metadata()["by"], "python");
        assert!(
            file.read("t")
                .expect("its tensor")
                .equal(&Tensor::from_slice(&[1i16, 2, 3, 4]).view([2, 2]))
        );
    }

    #[test]
    fn every_kind_is_read_back_as_it_was_written() {
        let values = Tensor::from_slice(&[0.0, 1.0, 2.0, 3.5, -1.0, 100.0]).view([3, 2]);
        let kinds = [
            "Bool", "Uint8", "Int8", "Int16", "Int", "Int64", "Half", "BFloat16", "Float", "Double",
        ];
        let each = [
            Kind::Bool,
            Kind::Uint8,
            Kind::Int8,
            Kind::Int16,
            Kind::Int,
            Kind::Int64,
            Kind::Half,
            Kind::BFloat16,
            Kind::Float,
            Kind::Double,
        ]
        .map(|kind| values.abs().to_kind(kind));
        let tensors: Vec<(&str, &Tensor)> = kinds.into_iter().zip(&each).collect();
        let (_folder, path) = saved(&tensors);
        let file = SafeTensors::open(&path).expect("own file");
        assert_eq!(file.tensors().iter().map(|info| info.name.as_str()).collect::<Vec<_>>(), kinds);
        for (name, tensor) in tensors {
            let back = file.read(name).expect("own tensor");
            assert_eq!((back.kind(), back.size()), (tensor.kind(), tensor.size()));
            assert!(back.equal(tensor), "{name}");
        }
    }

    #[test]
    fn a_scalar_is_read_back_as_a_scalar() {
        let (_folder, path) = saved(&[("s", &Tensor::from(2.5f32))]);
        let back = SafeTensors::open(&path).expect("own file").read("s").expect("own tensor");
        assert!(back.size().is_empty() && back.double_value(&[]) == 2.5, "{back:?}");
    }

    #[test]
    fn rows_come_in_the_order_asked_for_adjacent_or_not() {
        let table = Tensor::arange(40, (Kind::Int64, Device::Cpu)).view([10, 2, 2]);
        let (_folder, path) = saved(&[("before", &Tensor::from(1u8)), ("table", &table)]);
        let file = SafeTensors::open(&path).expect("own file");
        for rows in [&[3u64][..], &[2, 3, 4], &[9, 0, 1, 1, 5], &[7, 6, 5]] {
            let index = Tensor::from_slice(&rows.iter().map(|&row| row as i64).collect::<Vec<_>>());
            assert!(
                file.read_rows("table", rows)
                    .expect("its rows")
                    .equal(&table.index_select(0, &index)),
                "{rows:?}"
            );
        }
    }

    #[test]
    #[should_panic(expected = "row 10 of `table` [10, 1]")]
    fn a_row_beyond_the_last_is_a_bug() {
        let (_folder, path) =
            saved(&[("table", &Tensor::zeros([10, 1], (Kind::Float, Device::Cpu)))]);
        let _ = SafeTensors::open(&path).expect("own file").read_rows("table", &[9, 10]);
    }

    #[test]
    fn a_missing_tensor_is_told_with_those_that_exist() {
        let (_folder, path) = saved(&[("a", &Tensor::from(1u8)), ("b", &Tensor::from(1u8))]);
        let error =
            SafeTensors::open(&path).expect("own file").read("c").expect_err("no such tensor");
        assert!(error.to_string().ends_with("holds no tensor `c`; it has a, b"), "{error}");
    }
}
