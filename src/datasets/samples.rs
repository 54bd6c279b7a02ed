//! Samples that can be written as a dataset, wherever they come from.

use std::collections::BTreeMap;

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

/// Description of a dataset, as its `dataset.json` gives it.
#[derive(Clone, Debug)]
pub struct Description {
    pub name: String,
    pub source: String,
    pub licence: String,
    pub data_type: DataType,
}
