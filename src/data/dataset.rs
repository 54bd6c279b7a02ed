//! A dataset: a folder with `dataset.json` and the safetensors files that it lists, or the same compiled into the binary.
//!
//! A file holds samples of one shape, stacked along axis 0 of every tensor under the batch's own keys. Files of one
//! resolution group agree in keys, kinds and shapes, so that their samples may stand in one batch. Samples are numbered
//! through all files in their order. Every file stays open, so that files replaced during a run change nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use super::manifest::{self, FileEntry, Manifest};
use super::safetensors::{SafeTensors, TensorInfo, refuse_pickle, row_bytes, with_rows};
use super::{Batch, DataType, sha256};
use crate::error::{Error, Result};

/// Kind and shape of one sample's tensors, by key.
pub type Layout = BTreeMap<String, (Kind, Vec<i64>)>;

/// Samples of equal shapes: what one batch may be made of.
#[derive(Clone, Debug, Default)]
pub struct Group {
    pub name: String,
    /// Ascending.
    pub sample_ids: Vec<u64>,
    pub layout: Layout,
}

/// Named conditions to generate from, e.g. one text embedding a class.
#[derive(Debug)]
pub struct Conditions {
    pub names: Vec<String>,
    /// Row `i` belongs to name `i`.
    pub tensors: BTreeMap<String, Tensor>,
}

/// Samples that lie in files and are read by number.
#[derive(Debug)]
pub struct Dataset {
    path: PathBuf,
    manifest: Manifest,
    /// One a file of the manifest.
    files: Vec<SampleFile>,
    groups: Vec<Group>,
    conditions: Option<SafeTensors>,
    num_samples: u64,
}

#[derive(Debug)]
struct SampleFile {
    tensors: SafeTensors,
    first_id: u64,
    group: usize,
}

impl Dataset {
    /// Opens a folder: reads `dataset.json` and the header of every file, and checks that they agree.
    ///
    /// # Errors
    /// [`Error::Data`] if something is missing, malformed, outside of the folder or at odds with the rest.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        refuse_pickle(folder)?;
        let manifest = Manifest::of_folder(folder)?;
        Dataset::assemble(folder.into(), manifest, |relative| SafeTensors::open(manifest::resolve(folder, relative)?))
    }

    /// The same over bytes that are part of the binary: `dataset.json` and its files by their paths.
    pub fn embedded(json: &'static str, files: &'static [(&'static str, &'static [u8])]) -> Result<Self> {
        let path = Path::new("embedded");
        let manifest = Manifest::parse(&path.join(manifest::FILE_NAME), json.as_bytes())?;
        Dataset::assemble(path.into(), manifest, |relative| {
            let found = files.iter().find(|(name, _)| *name == relative);
            let (name, bytes) = found.ok_or_else(|| Error::data(path.join(relative), "is not part of the binary"))?;
            SafeTensors::from_static(&format!("embedded/{name}"), bytes)
        })
    }

    fn assemble(path: PathBuf, manifest: Manifest, open: impl Fn(&str) -> Result<SafeTensors>) -> Result<Self> {
        let mut dataset = Dataset { path, manifest, files: Vec::new(), groups: Vec::new(), conditions: None, num_samples: 0 };
        for index in 0..dataset.manifest.files.len() {
            let entry = dataset.manifest.files[index].clone();
            let tensors = open(&entry.path)?;
            dataset.add(&entry, tensors)?;
        }
        if let Some(entry) = &dataset.manifest.conditions {
            let file = open(&entry.path)?;
            layout_of(&file, entry.names.len() as u64, "names")?;
            dataset.conditions = Some(file);
        }
        Ok(dataset)
    }

    fn add(&mut self, entry: &FileEntry, tensors: SafeTensors) -> Result<()> {
        let layout = layout_of(&tensors, entry.samples, "samples")?;
        check_latents(&layout, self.manifest.data_type).map_err(|what| Error::data(tensors.path(), what))?;
        let known = self.groups.iter().position(|group| group.name == entry.group);
        let group = known.unwrap_or(self.groups.len());
        match self.files.iter().find(|file| file.group == group) {
            Some(first) => check_same(&tensors, &layout, first, &self.groups[group])?,
            None => self.groups.push(Group { name: entry.group.clone(), sample_ids: Vec::new(), layout }),
        }
        let first_id = self.num_samples;
        self.num_samples += entry.samples;
        self.groups[group].sample_ids.extend(first_id..self.num_samples);
        self.files.push(SampleFile { tensors, first_id, group });
        Ok(())
    }

    /// The folder, or `embedded`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Name, source and licence of the data, and the list of files.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn num_samples(&self) -> u64 {
        self.num_samples
    }

    pub fn data_type(&self) -> DataType {
        self.manifest.data_type
    }

    /// Resolution groups in the order in which their first files are listed.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Shape of one sample's latents, `[C, (F,) H, W]`; none if there is no such group.
    pub fn latent_shape(&self, group: &str) -> Option<&[i64]> {
        let group = self.groups.iter().find(|known| known.name == group)?;
        group.layout.get(latents_key(self.data_type())).map(|(_, shape)| shape.as_slice())
    }

    /// Hex digits that change with the files' names, groups, sample counts or hashes, as `dataset.json` gives them.
    pub fn fingerprint(&self) -> String {
        self.manifest.fingerprint()
    }

    /// Reads every file whole and compares it with its hash in `dataset.json`.
    ///
    /// # Errors
    /// [`Error::Data`] for the first file that differs.
    pub fn verify_hashes(&self) -> Result<()> {
        let files = self.files.iter().map(|file| &file.tensors).zip(self.manifest.files.iter().map(|entry| &entry.sha256));
        let conditions = self.conditions.iter().zip(self.manifest.conditions.iter().map(|entry| &entry.sha256));
        for (file, expected) in files.chain(conditions) {
            let mut hash = Sha256::new();
            file.for_each_piece(|piece| hash.update(piece))?;
            let found = sha256::hex(hash);
            if found != *expected {
                return Err(Error::data(file.path(), format!("has sha256 {found}, {} says {expected}", manifest::FILE_NAME)));
            }
        }
        Ok(())
    }

    /// The samples of these ids, in this order.
    ///
    /// # Errors
    /// [`Error::Data`] if a sample holds a number that is not finite, or its file was cut since it was opened.
    /// # Panics
    /// If there are no ids, or they are unknown or of several groups (bugs in the caller).
    pub fn batch(&self, ids: &[u64]) -> Result<Batch> {
        let group = self.file_of(ids[0]).group;
        assert!(ids.iter().all(|id| self.file_of(*id).group == group), "a batch of several resolution groups: {ids:?}");
        let keys = self.groups[group].layout.keys();
        let tensors = keys.map(|key| Ok((key.clone(), self.stacked(key, ids)?))).collect::<Result<_>>()?;
        Ok(Batch { tensors, data_type: self.data_type(), sample_ids: ids.to_vec() })
    }

    /// One key of these samples as one tensor.
    fn stacked(&self, key: &str, ids: &[u64]) -> Result<Tensor> {
        let first = &self.file_of(ids[0]).tensors;
        let info = first.info(key)?;
        let row_bytes = row_bytes(info) as usize;
        let mut data = first.buffer((row_bytes * ids.len()) as u64)?;
        let mut rest = data.as_mut_slice();
        for run in ids.chunk_by(|a, b| self.file_of(*a).first_id == self.file_of(*b).first_id) {
            let (now, later) = rest.split_at_mut(run.len() * row_bytes);
            self.file_of(run[0]).read_rows(key, run, now)?;
            rest = later;
        }
        Ok(Tensor::from_data_size(&data, &with_rows(info, ids.len()), info.kind))
    }

    fn file_of(&self, id: u64) -> &SampleFile {
        assert!(id < self.num_samples, "sample {id} of {}", self.num_samples);
        &self.files[self.files.partition_point(|file| file.first_id <= id) - 1]
    }

    /// The named conditions, if the dataset has any.
    ///
    /// # Errors
    /// As [`batch`](Self::batch).
    pub fn conditions(&self) -> Result<Option<Conditions>> {
        let (Some(file), Some(entry)) = (&self.conditions, &self.manifest.conditions) else { return Ok(None) };
        let mut tensors = BTreeMap::new();
        let rows: Vec<u64> = (0..entry.names.len() as u64).collect();
        for info in file.tensors() {
            let mut data = file.buffer(info.bytes)?;
            file.read_rows_into(info, &rows, &mut data)?;
            check_finite(file, info, &rows, &rows, &data)?;
            tensors.insert(info.name.clone(), Tensor::from_data_size(&data, &info.shape, info.kind));
        }
        Ok(Some(Conditions { names: entry.names.clone(), tensors }))
    }
}

impl SampleFile {
    /// Fills `data` with one key of these samples, all of this file.
    fn read_rows(&self, key: &str, ids: &[u64], data: &mut [u8]) -> Result<()> {
        let info = self.tensors.info(key)?;
        let rows: Vec<u64> = ids.iter().map(|id| id - self.first_id).collect();
        self.tensors.read_rows_into(info, &rows, data)?;
        check_finite(&self.tensors, info, ids, &rows, data)
    }
}

/// Key of the latents that the specification gives each type of data.
fn latents_key(data_type: DataType) -> &'static str {
    match data_type {
        DataType::Image => "image_latents",
        DataType::Video => "video_latents",
    }
}

/// What one row of the file is, once every tensor has been seen to have `rows` of them.
fn layout_of(file: &SafeTensors, rows: u64, word: &str) -> Result<Layout> {
    let mut layout = Layout::new();
    for TensorInfo { name, kind, shape, .. } in file.tensors() {
        if shape.first().is_none_or(|&found| found as u64 != rows) {
            let what = format!("`{name}` has shape {shape:?}, but {} says {rows} {word}", manifest::FILE_NAME);
            return Err(Error::data(file.path(), what));
        }
        layout.insert(name.clone(), (*kind, shape[1..].to_vec()));
    }
    Ok(layout)
}

fn check_latents(layout: &Layout, data_type: DataType) -> Result<(), String> {
    let (key, axes) = (latents_key(data_type), if data_type == DataType::Image { "[C, H, W]" } else { "[C, F, H, W]" });
    let Some((kind, shape)) = layout.get(key) else {
        let keys: Vec<&str> = layout.keys().map(String::as_str).collect();
        return Err(format!("holds no `{key}`, which {} data need; it has {}", data_type.word(), keys.join(", ")));
    };
    if shape.len() != axes.split(' ').count() || !is_float(*kind) {
        return Err(format!("`{key}` is {kind:?} {shape:?} a sample; expected floats {axes}"));
    }
    Ok(())
}

/// The file fits the group that an earlier file began.
fn check_same(file: &SafeTensors, layout: &Layout, first: &SampleFile, group: &Group) -> Result<()> {
    let first = first.tensors.path().display();
    let differs = |what: String| Err(Error::data(file.path(), format!("{what} of the same group `{}`", group.name)));
    for (key, (kind, shape)) in layout {
        match group.layout.get(key) {
            None => return differs(format!("holds `{key}`, which is not in {first}")),
            Some((other_kind, other_shape)) if (kind, shape) != (other_kind, other_shape) => {
                return differs(format!("`{key}` is {kind:?} {shape:?} a sample, but {other_kind:?} {other_shape:?} in {first}"));
            }
            Some(_) => {}
        }
    }
    match group.layout.keys().find(|key| !layout.contains_key(*key)) {
        Some(key) => differs(format!("holds no `{key}`, which is in {first}")),
        None => Ok(()),
    }
}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}

/// Refuses NaN and infinities in the bytes of `rows` before they reach the loss, where nobody could say whose they are.
fn check_finite(file: &SafeTensors, info: &TensorInfo, ids: &[u64], rows: &[u64], data: &[u8]) -> Result<()> {
    let row_bytes = row_bytes(info) as usize;
    for (bytes, (id, row)) in data.chunks_exact(row_bytes).zip(ids.iter().zip(rows)) {
        if let Some((count, first)) = not_finite(info.kind, bytes) {
            let first = index_of(first, &info.shape[1..]);
            let what = format!("`{}` of sample {id} (row {row}) has {count} numbers that are not finite, the first at {first:?}", info.name);
            return Err(Error::data(file.path(), what));
        }
    }
    Ok(())
}

/// How many elements are NaN or infinite, and which is the first. On the bytes: a tensor operation here would start
/// libtorch's threads on the reader's side as well.
fn not_finite(kind: Kind, bytes: &[u8]) -> Option<(usize, usize)> {
    fn scan<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<(usize, usize)> {
        let (elements, _) = bytes.as_chunks::<N>();
        match elements.iter().filter(|element| bad(**element)).count() {
            0 => None,
            count => elements.iter().position(|element| bad(*element)).map(|first| (count, first)),
        }
    }
    // An exponent of all ones is infinity or NaN.
    match kind {
        Kind::Half => scan(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Kind::BFloat16 => scan(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Kind::Float => scan(bytes, |b| !f32::from_le_bytes(b).is_finite()),
        Kind::Double => scan(bytes, |b| !f64::from_le_bytes(b).is_finite()),
        _ => None,
    }
}

/// The index along each axis of the `flat`-th element.
fn index_of(flat: usize, shape: &[i64]) -> Vec<i64> {
    let mut rest = flat as i64;
    let mut index = vec![0; shape.len()];
    for (axis, size) in shape.iter().enumerate().rev() {
        index[axis] = rest % size;
        rest /= size;
    }
    index
}
