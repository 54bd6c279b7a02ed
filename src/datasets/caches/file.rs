//! A file of a cache: safetensors, or what `torch.save` wrote.

use std::path::Path;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::files::pickle::{PickledFile, PickledTensor, Value};
use crate::files::safetensors::{Content, SafeTensors};

/// An open file of tensors with names.
pub(super) enum CacheFile {
    Safe(SafeTensors),
    Pickled(PickledFile),
}

impl CacheFile {
    /// Opens a file by its ending.
    ///
    /// # Errors
    /// Errors of [`SafeTensors::open`] and [`PickledFile::open`].
    pub fn open(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            SafeTensors::open_as(path, Content::Cache).map(CacheFile::Safe)
        } else {
            PickledFile::open(path).map(CacheFile::Pickled)
        }
    }

    pub fn path(&self) -> &Path {
        match self {
            CacheFile::Safe(file) => file.path(),
            CacheFile::Pickled(file) => file.path(),
        }
    }

    /// True if the file has a tensor of this name.
    pub fn holds(&self, name: &str) -> bool {
        self.describe(name).is_ok()
    }

    /// Returns kind and shape of a tensor.
    ///
    /// # Errors
    /// [`Error::Data`] if there is none of this name.
    pub fn describe(&self, name: &str) -> Result<(Kind, Vec<i64>)> {
        match self {
            CacheFile::Safe(file) => file.info(name).map(|info| (info.kind, info.shape.clone())),
            CacheFile::Pickled(file) => {
                let tensor = tensor(file, name)?;
                Ok((tensor.kind, tensor.shape.clone()))
            }
        }
    }

    pub fn read(&self, name: &str) -> Result<Tensor> {
        match self {
            CacheFile::Safe(file) => file.read(name),
            CacheFile::Pickled(file) => file.read(tensor(file, name)?),
        }
    }
}

fn tensor<'f>(file: &'f PickledFile, name: &str) -> Result<&'f PickledTensor> {
    let missing = || Error::data(file.path(), format!("holds no tensor `{name}`"));
    file.root().get(name).and_then(Value::tensor).ok_or_else(missing)
}
