//! A file of a cache: safetensors, or what `torch.save` wrote, alone or as one record of many.

use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::files::pickle::{PickledFile, PickledTensor, Region, Value};
use crate::files::safetensors::{Content, SafeTensors};

/// Name of the only tensor of a file that holds nothing else.
pub(super) const BARE: &str = "";

/// A file, or the part of it that is a record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Location {
    pub path: PathBuf,
    /// The whole file if unset.
    pub region: Option<Region>,
}

impl Location {
    pub fn whole(path: &Path) -> Self {
        Location { path: path.into(), region: None }
    }
}

/// An open file of tensors with names.
pub(super) struct CacheFile {
    location: Location,
    contents: Contents,
}

enum Contents {
    Safe(SafeTensors),
    Pickled(PickledFile),
}

impl CacheFile {
    /// Opens a whole file, by its ending.
    ///
    /// # Errors
    /// Errors of [`SafeTensors::open`] and [`PickledFile::open`].
    pub fn open(path: &Path) -> Result<Self> {
        CacheFile::at(&Location::whole(path))
    }

    /// Opens a file by its ending, or a record.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::Data`] if a record reaches beyond its file's end.
    pub fn at(location: &Location) -> Result<Self> {
        let Location { path, region } = location;
        let is_safe = path.extension().is_some_and(|ending| ending == "safetensors");
        let contents = match region {
            Some(region) => Contents::Pickled(PickledFile::open_region(path, *region)?),
            None if is_safe => Contents::Safe(SafeTensors::open_as(path, Content::Cache)?),
            None => Contents::Pickled(PickledFile::open(path)?),
        };
        Ok(CacheFile { location: location.clone(), contents })
    }

    pub fn path(&self) -> &Path {
        &self.location.path
    }

    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Returns the file if it is of safetensors.
    pub fn safe(&self) -> Option<&SafeTensors> {
        match &self.contents {
            Contents::Safe(file) => Some(file),
            Contents::Pickled(_) => None,
        }
    }

    /// Returns the value under a key of the object that was saved.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.root().and_then(|root| root.get(key))
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.value(key).and_then(Value::text)
    }

    /// Returns the names of everything in the file, for a message.
    pub fn names(&self) -> String {
        let names: Vec<&str> = match &self.contents {
            Contents::Safe(file) => file.tensors().iter().map(|info| info.name.as_str()).collect(),
            Contents::Pickled(file) => {
                file.root().entries().into_iter().flatten().map(|(name, _)| &**name).collect()
            }
        };
        if names.is_empty() { "nothing with a name".into() } else { names.join(", ") }
    }

    /// True if the file is one tensor and nothing else.
    pub fn is_bare(&self) -> bool {
        self.root().is_some_and(|root| root.tensor().is_some())
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
        match &self.contents {
            Contents::Safe(file) => file.info(name).map(|info| (info.kind, info.shape.clone())),
            Contents::Pickled(file) => {
                let tensor = tensor(file, name)?;
                Ok((tensor.kind, tensor.shape.clone()))
            }
        }
    }

    pub fn read(&self, name: &str) -> Result<Tensor> {
        match &self.contents {
            Contents::Safe(file) => file.read(name),
            Contents::Pickled(file) => file.read(tensor(file, name)?),
        }
    }

    /// Returns the number of tokens before the padding that a mask marks by 0.
    ///
    /// # Errors
    /// [`Error::Data`] if there is padding before a token; errors of [`read`](Self::read).
    pub fn valid_tokens(&self, mask: &str) -> Result<i64> {
        let tokens = self.read(mask)?.flatten(0, -1).ne(0).to_kind(Kind::Int64);
        let valid = tokens.sum(Kind::Int64).int64_value(&[]);
        if tokens.narrow(0, 0, valid).sum(Kind::Int64).int64_value(&[]) != valid {
            let what =
                format!("has padding before its tokens by `{mask}`; expected it behind them");
            return Err(Error::data(self.path(), what));
        }
        Ok(valid)
    }

    fn root(&self) -> Option<&Value> {
        match &self.contents {
            Contents::Safe(_) => None,
            Contents::Pickled(file) => Some(file.root()),
        }
    }
}

fn tensor<'f>(file: &'f PickledFile, name: &str) -> Result<&'f PickledTensor> {
    let found = match name {
        BARE => file.root().tensor(),
        _ => file.root().get(name).and_then(Value::tensor),
    };
    found.ok_or_else(|| Error::data(file.path(), format!("holds no tensor `{name}`")))
}
