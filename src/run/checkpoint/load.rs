//! Loads checkpoints: everything is checked before anything is changed.

use std::path::Path;

use tch::Kind;

use super::{AllowedChanges, Manifest, verify};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::files::safetensors::Shards;
use crate::nn::Stage;
use crate::optim::Optimizer;
use crate::parallel::Replica;
use crate::run::base::Base;
use crate::run::changes::{self, Values};
use crate::run::optimizer_state::OptimizerState;
use crate::run::pretrained;

/// Loads a verified checkpoint into a model with the same parameters, whatever the sharding of
/// either. Names, shapes and kinds are compared before anything is changed; then the stages are
/// read one at a time, and each rank keeps its shards.
///
/// # Errors
/// [`Error::CheckpointMismatch`] if it belongs to another run or model; lists every key at fault.
pub fn load(
    folder: &Path,
    config: &RunConfig,
    configured: &Manifest,
    allowed: AllowedChanges,
    replica: &mut Replica<'_>,
    optimizer: &dyn Optimizer,
    state: &mut OptimizerState,
) -> Result<Manifest> {
    let manifest = verify::manifest(folder)?;
    let changed = manifest.check_same_run(folder, config, configured, allowed)?;
    let parts = open_parts(folder, &manifest, "")?;
    let prefixes: Vec<String> =
        optimizer.state_names().iter().map(|name| format!("{name}.")).collect();
    check_keys(folder, &parts, &replica.stages, &prefixes)?;
    set_parameters(&parts, replica)?;
    for (index, stage) in replica.stages.iter().enumerate() {
        for (name, prefix) in prefixes.iter().enumerate() {
            let read = pretrained::flat(stage.params().trained(), |info| {
                parts.read(&format!("{prefix}{}", info.name))
            })?;
            state.set(index, name, &read, &replica.buckets[index]);
        }
    }
    changed.iter().for_each(|what| tracing::warn!("{what}"));
    Ok(Manifest {
        step: manifest.step,
        samples_seen: manifest.samples_seen,
        guard: manifest.guard,
        lr: manifest.lr,
        ..configured.clone()
    })
}

/// Loads only the trained parameters. `base`: what the frozen ones are.
///
/// # Errors
/// As [`load`].
pub fn load_parameters(
    folder: &Path,
    config: &RunConfig,
    base: Option<&Base>,
    replica: &mut Replica<'_>,
) -> Result<()> {
    if let Some(what) = verify::manifest(folder)?.other_base(base) {
        return Err(Error::checkpoint_mismatch(folder, what));
    }
    set_parameters(&open_parameters(folder, config, &replica.stages)?, replica)
}

/// Returns the number of steps that a checkpoint's run had done.
///
/// # Errors
/// [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn step_of(folder: &Path) -> Result<u64> {
    Ok(verify::manifest(folder)?.step)
}

/// Returns what the frozen parameters were that a checkpoint's run began with; `None` if there are
/// none.
///
/// # Errors
/// [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn base_of(folder: &Path) -> Result<Option<Base>> {
    Ok(verify::manifest(folder)?.base)
}

/// Returns the configuration that a checkpoint records; empty for format version 2, which records
/// none.
///
/// # Errors
/// [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn recorded(folder: &Path) -> Result<Values> {
    Ok(verify::manifest(folder)?.config.unwrap_or_default())
}

fn set_parameters(parts: &Shards, replica: &mut Replica<'_>) -> Result<()> {
    for (stage, bucket) in replica.stages.iter().zip(&mut replica.buckets) {
        let trained = stage.params().trained();
        bucket.set_trained(&pretrained::flat(trained, |info| parts.read(&info.name))?);
    }
    Ok(())
}

/// Opens the files that hold the trained parameters, and checks that they contain those of the stages
/// in f32 and nothing else.
///
/// # Errors
/// As [`load`].
pub fn open_parameters(
    folder: &Path,
    config: &RunConfig,
    stages: &[Box<dyn Stage>],
) -> Result<Shards> {
    let manifest = verify::manifest(folder)?;
    // Format version 2 has no record, so the configuration in the run folder is used.
    let other =
        manifest.config.as_ref().and_then(|record| changes::other_architecture(record, config));
    other.map_or(Ok(()), |what| Err(Error::checkpoint_mismatch(folder, what)))?;
    let parts = open_parts(folder, &manifest, "model-")?;
    check_keys(folder, &parts, stages, &[])?;
    Ok(parts)
}

/// Opens the files whose names begin with `kind`.
fn open_parts(folder: &Path, manifest: &Manifest, kind: &str) -> Result<Shards> {
    let wanted =
        manifest.parts.iter().map(|part| part.file.clone()).filter(|file| file.starts_with(kind));
    Shards::open(folder, wanted)
        .map_err(|error| Error::checkpoint_mismatch(folder, error.to_string()))
}

/// Compares names, shapes and kinds with those that the model and each optimizer tensor expect.
fn check_keys(
    folder: &Path,
    parts: &Shards,
    stages: &[Box<dyn Stage>],
    prefixes: &[String],
) -> Result<()> {
    let prefixes = || std::iter::once("").chain(prefixes.iter().map(String::as_str));
    let infos = stages.iter().flat_map(|stage| stage.params().trained());
    let expected = infos.flat_map(|info| {
        prefixes().map(|prefix| (format!("{prefix}{}", info.name), info.shape.as_slice()))
    });
    parts
        .check(&expected.collect(), &[Kind::Float], &[])
        .map_err(|what| Error::checkpoint_mismatch(folder, what))
}
