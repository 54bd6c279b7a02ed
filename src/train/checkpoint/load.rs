//! Reading a checkpoint: everything is checked and read before anything is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use tch::{Device, Kind, Tensor, no_grad};

use super::{MANIFEST, Manifest};
use crate::data::safetensors::SafeTensors;
use crate::error::{Error, Result};
use crate::nn::ParamSet;
use crate::optim::Optimizer;
use crate::parallel::Replica;

/// Missing or unexpected names that a message lists before it only counts.
const LISTED_NAMES: usize = 20;

/// Loads a verified checkpoint into a model of the same parameters; nothing is changed before all of it was read.
///
/// # Errors
/// [`Error::CheckpointMismatch`] if it belongs to another run or model, listing every key at fault.
pub fn load(
    folder: &Path,
    configured: &Manifest,
    replica: &mut Replica,
    optimizer: &dyn Optimizer,
    state: &mut [Vec<Tensor>],
) -> Result<Manifest> {
    let manifest = read_manifest(folder)?;
    manifest.check_same_run(folder, configured)?;
    let files = PartFiles::open(folder, &manifest, "")?;
    let prefixes: Vec<String> = optimizer.state_names().iter().map(|name| format!("{name}.")).collect();
    files.check_keys(replica, &prefixes)?;
    let read = |prefix: &str| replica.stages.iter().map(|stage| files.flat(prefix, stage.params())).collect::<Result<Vec<_>>>();
    let masters = read("")?;
    let moments = prefixes.iter().map(|prefix| read(prefix)).collect::<Result<Vec<_>>>()?;
    adopt(replica, &masters);
    no_grad(|| {
        for (kind, flats) in moments.iter().enumerate() {
            state.iter_mut().zip(flats).for_each(|(tensors, flat)| tensors[kind].copy_(flat));
        }
    });
    Ok(Manifest { parts: Vec::new(), ..manifest })
}

/// Loads the parameters alone.
///
/// # Errors
/// As [`load`].
pub fn load_parameters(folder: &Path, replica: &mut Replica) -> Result<Manifest> {
    let manifest = read_manifest(folder)?;
    let files = PartFiles::open(folder, &manifest, "model-")?;
    files.check_keys(replica, &[])?;
    let masters = replica.stages.iter().map(|stage| files.flat("", stage.params())).collect::<Result<Vec<_>>>()?;
    adopt(replica, &masters);
    Ok(manifest)
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let text = fs::read_to_string(&path).map_err(Error::storage(&path, "read"))?;
    serde_json::from_str(&text).map_err(|error| Error::checkpoint_mismatch(&path, format!("is no manifest: {error}")))
}

fn adopt(replica: &mut Replica, masters: &[Tensor]) {
    for (bucket, flat) in replica.buckets.iter_mut().zip(masters) {
        bucket.update(|master| master.copy_(flat));
    }
}

/// The opened parts of a checkpoint.
struct PartFiles<'f> {
    folder: &'f Path,
    files: Vec<SafeTensors>,
}

impl<'f> PartFiles<'f> {
    /// Those whose names begin with `kind`.
    fn open(folder: &'f Path, manifest: &Manifest, kind: &str) -> Result<Self> {
        let wanted = manifest.parts.iter().filter(|part| part.file.starts_with(kind));
        let files = wanted.map(|part| SafeTensors::open(folder.join(&part.file))).collect::<Result<Vec<_>>>();
        let as_mismatch = |error: Error| Error::checkpoint_mismatch(folder, error.to_string());
        Ok(PartFiles { folder, files: files.map_err(as_mismatch)? })
    }

    /// Compares names, shapes and kinds with what the model and each optimizer tensor expect.
    fn check_keys(&self, replica: &Replica, prefixes: &[String]) -> Result<()> {
        let mut expected = BTreeMap::new();
        for prefix in std::iter::once("").chain(prefixes.iter().map(String::as_str)) {
            expected.extend(replica.infos().map(|info| (format!("{prefix}{}", info.name), &info.shape)));
        }
        let found: BTreeMap<&str, _> = self.files.iter().flat_map(|file| file.tensors()).map(|info| (info.name.as_str(), info)).collect();
        let missing = expected.keys().filter(|name| !found.contains_key(name.as_str())).cloned().collect();
        let known: BTreeSet<&str> = expected.keys().map(String::as_str).collect();
        let unexpected = found.keys().filter(|name| !known.contains(*name)).map(ToString::to_string).collect();
        let unfit = found.values().filter_map(|info| {
            let shape = *expected.get(&info.name)?;
            let fits = info.kind == Kind::Float && info.shape == *shape;
            (!fits).then(|| format!("{} is {:?} {:?} instead of Float {shape:?}", info.name, info.kind, info.shape))
        });
        let texts = [("missing", missing), ("unexpected", unexpected), ("of another shape or kind", unfit.collect())];
        let texts: Vec<String> = texts.into_iter().filter_map(|(what, names)| listed(what, names)).collect();
        if texts.is_empty() { Ok(()) } else { Err(Error::checkpoint_mismatch(self.folder, texts.join("; "))) }
    }

    /// One stage's parameters as the flat buffer that holds them.
    fn flat(&self, prefix: &str, params: &ParamSet) -> Result<Tensor> {
        let read = |name: String| {
            let holds = |file: &&SafeTensors| file.tensors().iter().any(|info| info.name == name);
            self.files.iter().find(holds).expect("all keys were checked").read(&name)
        };
        let pieces = params.infos().iter().map(|info| Ok(read(format!("{prefix}{}", info.name))?.flatten(0, -1)));
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        Ok(if pieces.is_empty() { Tensor::zeros([0], (Kind::Float, Device::Cpu)) } else { Tensor::cat(&pieces, 0) })
    }
}

fn listed(what: &str, names: Vec<String>) -> Option<String> {
    let more = names.len().saturating_sub(LISTED_NAMES);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty()).then(|| format!("{what}: {}{tail}", names[..names.len() - more].join(", ")))
}
