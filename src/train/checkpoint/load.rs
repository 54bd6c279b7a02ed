//! Reading a checkpoint: everything is checked and read before anything is changed.

use std::path::Path;

use tch::Kind;

use super::{Manifest, verify};
use crate::data::safetensors::Shards;
use crate::error::{Error, Result};
use crate::nn::Stage;
use crate::optim::Optimizer;
use crate::parallel::Replica;
use crate::train::state::OptimizerState;
use crate::train::weights;

/// Loads a verified checkpoint into a model of the same parameters, however it and the checkpoint are shared. Names, shapes
/// and kinds are compared before anything is changed; then a stage at a time is read, and each rank keeps what it holds.
///
/// # Errors
/// [`Error::CheckpointMismatch`] if it belongs to another run or model, listing every key at fault.
pub fn load(
    folder: &Path,
    configured: &Manifest,
    allow_data_change: bool,
    replica: &mut Replica<'_>,
    optimizer: &dyn Optimizer,
    state: &mut OptimizerState,
) -> Result<Manifest> {
    let manifest = verify::manifest(folder)?;
    let other_data = manifest.check_same_run(folder, configured, allow_data_change)?;
    let parts = open_parts(folder, &manifest, "")?;
    let prefixes: Vec<String> = optimizer.state_names().iter().map(|name| format!("{name}.")).collect();
    check_keys(folder, &parts, &replica.stages, &prefixes)?;
    set_parameters(&parts, replica)?;
    for (index, stage) in replica.stages.iter().enumerate() {
        for (name, prefix) in prefixes.iter().enumerate() {
            let read = weights::flat(stage.params(), |parameter| parts.read(&format!("{prefix}{parameter}")))?;
            state.set(index, name, &read, &replica.buckets[index]);
        }
    }
    if let Some(what) = other_data {
        tracing::warn!("{what}; going on with other data, as was asked");
    }
    Ok(Manifest { parts: Vec::new(), sha256: String::new(), data: configured.data.clone(), ..manifest })
}

/// Loads the parameters alone.
///
/// # Errors
/// As [`load`].
pub fn load_parameters(folder: &Path, replica: &mut Replica<'_>) -> Result<()> {
    set_parameters(&open_parameters(folder, &replica.stages)?, replica)
}

fn set_parameters(parts: &Shards, replica: &mut Replica<'_>) -> Result<()> {
    for (stage, bucket) in replica.stages.iter().zip(&mut replica.buckets) {
        bucket.set(&weights::flat(stage.params(), |name| parts.read(name))?);
    }
    Ok(())
}

/// The opened parts that hold the parameters, f32 and all of the stages' and no others.
///
/// # Errors
/// As [`load`].
pub fn open_parameters(folder: &Path, stages: &[Box<dyn Stage>]) -> Result<Shards> {
    let parts = open_parts(folder, &verify::manifest(folder)?, "model-")?;
    check_keys(folder, &parts, stages, &[])?;
    Ok(parts)
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
