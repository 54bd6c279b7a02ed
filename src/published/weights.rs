//! The weights of a class's folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::{Names, Part};
use crate::error::{Error, Result};
use crate::files::safetensors::Shards;
use crate::nn::{ParamSet, Views};

/// Kinds of published weights.
const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// The weights of a folder, of which the headers alone have been read.
#[derive(Debug)]
pub struct Weights {
    folder: PathBuf,
    shards: Shards,
    names: Names,
    prefix: &'static str,
}

impl Weights {
    /// Opens the weights of a part's folder, in one file or in those that an index names.
    ///
    /// # Errors
    /// [`Error::Data`] if there are none, or a header is wrong.
    pub fn open(folder: &Path, part: Part, names: Names) -> Result<Self> {
        let shards = Shards::open_stem(folder, part.stem)?;
        let prefix = names.prefix(|name| shards.holds(name));
        Ok(Weights { folder: folder.into(), shards, names, prefix })
    }

    /// Compares with the names and shapes of a class's tensors.
    ///
    /// # Errors
    /// [`Error::Data`] with a list of every missing, unexpected and misshapen tensor.
    pub fn check(&self, tensors: &BTreeMap<String, Vec<i64>>) -> Result<()> {
        let held = |(name, shape): (&String, _)| (self.held(name), shape);
        let expected = tensors.iter().map(|(name, shape)| held((name, shape.as_slice()))).collect();
        let checked = self.shards.check(&expected, &KINDS, self.names.unused);
        checked.map_err(|what| Error::data(&self.folder, what))
    }

    /// Reads one tensor, on the CPU and of the kind that it has there.
    ///
    /// # Errors
    /// Errors of reading; [`Error::Data`] naming the first number that is not finite.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        self.shards.read_finite(&self.held(name))
    }

    /// Loads the tensors of `params`, one after the other, so that the host holds one at a time
    /// where the device is another.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn load(&self, params: &ParamSet, device: Device, kind: Kind) -> Result<Views> {
        let tensor = |name: &str| Ok(self.read(name)?.to_device(device).to_kind(kind));
        let tensors = params.infos().iter().map(|info| tensor(&info.name));
        Ok(params.views(tensors.collect::<Result<_>>()?))
    }

    /// The name under which the files hold a tensor.
    fn held(&self, name: &str) -> String {
        let own = format!("{}{name}", self.prefix);
        match self.names.other(name).map(|other| format!("{}{other}", self.prefix)) {
            Some(other) if !self.shards.holds(&own) && self.shards.holds(&other) => other,
            _ => own,
        }
    }
}
