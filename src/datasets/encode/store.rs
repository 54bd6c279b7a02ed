//! Encoded rows on the disk, until all of them are there and the dataset is written: a folder
//! beside the dataset's, with one file a batch. A file that is there is whole, so that work that
//! was killed goes on with the batches that are missing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use tch::{Device, Tensor};

use crate::collective::Collective;
use crate::collective::agreement::{agree, known_to_all, on_rank_zero};
use crate::data::DATASET_FILE;
use crate::data::group::{Layout, SampleTensor};
use crate::encoding::Conditions;
use crate::error::{Error, Result};
use crate::files::disk::Disk;
use crate::files::durable::replace_file;
use crate::files::outputs::{Named, check_new_folder, hold};
use crate::files::safetensors::{SafeTensors, write};

/// Ending of the folder's name behind that of the dataset.
const ENDING: &str = ".encoded";
/// File that names the plan whose batches the folder holds.
const PLAN: &str = "plan";

/// The folder of encoded batches.
#[derive(Debug)]
pub(super) struct Store {
    folder: PathBuf,
    /// Held on rank 0 while the store is open.
    lock: Option<File>,
}

/// Place of a row: its batch's file, and its number there.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub file: String,
    pub number: usize,
}

impl Store {
    /// Creates the folder, or opens the one in which work on the same plan was begun; nothing of
    /// `out` is touched.
    ///
    /// # Errors
    /// [`Error::Data`] if the folder belongs to another plan; [`Error::Config`] if it cannot be
    /// created.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn open(out: &Path, plan: &str, collective: &dyn Collective) -> Result<Self> {
        let folder = beside(out);
        let plans = agree(Ok(plan.into()), collective)?;
        if plans.iter().any(|other| other != plan) {
            let what = "would be made of other files on another rank: of pictures that change, or of a copy of the \
                        pipeline whose files have other paths or times";
            return Err(known_to_all(Error::data(out, what), 0, collective));
        }
        let mut lock = None;
        on_rank_zero(collective, || {
            lock = Some(begin(&folder, plan)?);
            Ok(String::new())
        })?;
        Ok(Store { folder, lock })
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// True if a batch was finished.
    pub fn has(&self, file: &str) -> bool {
        self.path(file).is_file()
    }

    /// Writes the rows of a batch.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn write(&self, file: &str, rows: &[Conditions]) -> Result<()> {
        let named = rows.iter().enumerate().flat_map(|(number, row)| {
            row.iter().map(move |(key, tensor)| (name_of(number, key), tensor))
        });
        // The format has no tensors without numbers; `read` makes them anew.
        let named: Vec<(String, &Tensor)> =
            named.filter(|(_, tensor)| tensor.numel() > 0).collect();
        let tensors: Vec<(&str, &Tensor)> =
            named.iter().map(|(name, tensor)| (name.as_str(), *tensor)).collect();
        replace_file(&self.path(file), |mut out| write(&mut out, &tensors, &BTreeMap::new()))
    }

    /// Reads a row, whose tensors are those of `layout`.
    ///
    /// # Errors
    /// Errors of reading.
    pub fn read(&self, row: &Row, layout: &Layout) -> Result<Conditions> {
        let file = SafeTensors::open(self.path(&row.file))?;
        let read = |(key, tensor): (&String, &SampleTensor)| {
            let SampleTensor { kind, shape, .. } = tensor;
            let found = match shape.contains(&0) {
                true => Tensor::empty(shape, (*kind, Device::Cpu)),
                false => file.read(&name_of(row.number, key))?,
            };
            Ok((key.clone(), found))
        };
        layout.iter().map(read).collect()
    }

    /// Deletes the folder.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn delete(self) -> Result<()> {
        let Store { folder, lock } = self;
        // NFS keeps files that are open, under other names in the same folder.
        drop(lock);
        Disk::PLAIN.delete(&folder)
    }
}

fn name_of(number: usize, key: &str) -> String {
    format!("{number}.{key}")
}

/// Refuses a folder that is a dataset already, before hours of work.
///
/// # Errors
/// [`Error::Data`].
pub(super) fn check_free(out: &Path) -> Result<()> {
    if !out.join(DATASET_FILE).exists() {
        return Ok(());
    }
    let rest = beside(out);
    let what = match rest.exists() {
        true => format!(
            "is a whole dataset already; {}, from which it was written, can be removed",
            rest.display()
        ),
        false => "is a dataset already; give another --out, or remove it to encode anew".into(),
    };
    Err(Error::data(out, what))
}

/// Returns the store's folder for a dataset at `out`.
fn beside(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(ENDING);
    out.with_file_name(name)
}

/// Makes the folder, or takes the one in which work on this plan was begun. Returns its lock: two
/// processes would publish each other's halves.
fn begin(folder: &Path, plan: &str) -> Result<File> {
    check_new_folder(Named { argument: "--out", path: folder })?;
    fs::create_dir_all(folder).map_err(Error::storage(folder, "create"))?;
    let path = folder.join(PLAN);
    let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let mut lock = open().map_err(Error::storage(&path, "open"))?;
    hold(&lock, folder)?;
    let begun = fs::read_to_string(&path).map_err(Error::storage(&path, "read"))?;
    if begun.is_empty() {
        let written = lock.write_all(plan.as_bytes()).and_then(|()| lock.sync_all());
        written.map_err(Error::storage(&path, "write"))?;
    } else if begun != plan {
        let what = "holds what was encoded of other pictures, by other options, or by a pipeline whose files have \
                    other paths or times; remove it, or give another --out";
        return Err(Error::data(folder, what));
    }
    Ok(lock)
}
