//! Reading a checkpoint: everything is checked and read before anything is changed.

use std::fs;
use std::path::Path;

use tch::{Kind, Tensor, no_grad};

use super::{MANIFEST, Manifest};
use crate::data::safetensors::Shards;
use crate::error::{Error, Result};
use crate::nn::Stage;
use crate::optim::Optimizer;
use crate::parallel::Replica;
use crate::train::weights;

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
    let parts = open_parts(folder, &manifest, "")?;
    let prefixes: Vec<String> = optimizer.state_names().iter().map(|name| format!("{name}.")).collect();
    check_keys(folder, &parts, &replica.stages, &prefixes)?;
    let read = |prefix: &str| replica.stages.iter().map(|stage| weights::flat(&parts, prefix, stage.params())).collect::<Result<Vec<_>>>();
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
pub fn load_parameters(folder: &Path, replica: &mut Replica) -> Result<()> {
    let parts = open_parameters(folder, &replica.stages)?;
    let masters = replica.stages.iter().map(|stage| weights::flat(&parts, "", stage.params())).collect::<Result<Vec<_>>>()?;
    adopt(replica, &masters);
    Ok(())
}

/// The opened parts that hold the parameters, f32 and all of the stages' and no others.
///
/// # Errors
/// As [`load`].
pub fn open_parameters(folder: &Path, stages: &[Box<dyn Stage>]) -> Result<Shards> {
    let parts = open_parts(folder, &read_manifest(folder)?, "model-")?;
    check_keys(folder, &parts, stages, &[])?;
    Ok(parts)
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

/// The parts whose names begin with `kind`.
fn open_parts(folder: &Path, manifest: &Manifest, kind: &str) -> Result<Shards> {
    let wanted = manifest.parts.iter().map(|part| part.file.clone()).filter(|file| file.starts_with(kind));
    Shards::open(folder, wanted).map_err(|error| Error::checkpoint_mismatch(folder, error.to_string()))
}

/// Compares names, shapes and kinds with what the model and each optimizer tensor expect.
fn check_keys(folder: &Path, parts: &Shards, stages: &[Box<dyn Stage>], prefixes: &[String]) -> Result<()> {
    let prefixes = || std::iter::once("").chain(prefixes.iter().map(String::as_str));
    let infos = stages.iter().flat_map(|stage| stage.params().infos());
    let expected = infos.flat_map(|info| prefixes().map(|prefix| (format!("{prefix}{}", info.name), info.shape.as_slice())));
    parts.check(&expected.collect(), &[Kind::Float], &[]).map_err(|what| Error::checkpoint_mismatch(folder, what))
}
