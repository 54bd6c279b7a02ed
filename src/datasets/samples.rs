//! Samples that can be written as a dataset, wherever they come from.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use crate::data::group::Layout;
use crate::data::{Caption, DataType};
use crate::error::Result;

/// Description of one sample, known before its tensors are read.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Kinds and shapes of its tensors by the keys of batches.
    pub layout: Layout,
    pub caption: Caption,
    /// Names the sample's bytes: if it is the same, so are they.
    pub origin: String,
}

/// Samples that threads read one at a time.
pub trait Samples: Sync {
    /// Returns all samples, in the order in which they are written.
    fn list(&self) -> &[Sample];

    /// Returns how often an epoch takes a sample.
    fn repeats(&self, _index: usize) -> u64 {
        1
    }

    /// Reads the tensors of one sample, with the kinds and shapes of its description.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) and
    /// [`Error::Storage`](crate::error::Error::Storage) of its files.
    fn read(&self, index: usize) -> Result<BTreeMap<String, Tensor>>;
}

/// Facts of a dataset that its maker may give.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// That of the folder it is made of if unset.
    pub name: Option<String>,
    pub source: Option<String>,
    pub licence: Option<String>,
}

impl About {
    /// Describes a dataset that is made of a folder.
    pub fn describe(&self, folder: &Path, data_type: DataType) -> Description {
        let real = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
        let name = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let known = |given: &Option<String>| given.clone().unwrap_or_else(|| "unknown".into());
        Description {
            name: self.name.clone().unwrap_or(name),
            source: known(&self.source),
            licence: known(&self.licence),
            data_type,
        }
    }
}

/// Description of a dataset, as its `dataset.json` gives it.
#[derive(Clone, Debug)]
pub struct Description {
    pub name: String,
    pub source: String,
    pub licence: String,
    pub data_type: DataType,
}
