//! Loads checkpoints: everything is checked before anything is changed.

use std::path::Path;

use tch::Kind;

use super::snapshot::AVERAGES;
use super::{AllowedChanges, Manifest, SavedWeights, verify};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::files::safetensors::Shards;
use crate::nn::Stage;
use crate::optim::Optimizer;
use crate::parallel::Replica;
use crate::run::changes::{self, Values};
use crate::run::frozen_base::Base;
use crate::run::optimizer_state::OptimizerState;
use crate::run::pretrained;

/// Loads a verified checkpoint into a model with the same parameters, whatever the sharding of
/// either. Names, shapes and kinds are compared before anything is changed; then the stages are
/// read one at a time, and each rank keeps its shards. Averages that the checkpoint lacks begin as
/// its weights; those that the run does not want are left out.
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
    let parts = open_parts(folder, &manifest, |file| !is_averages(file))?;
    let prefixes: Vec<String> =
        optimizer.state_names().iter().map(|name| format!("{name}.")).collect();
    check_keys(folder, &parts, &replica.stages, &prefixes)?;
    let averaged = manifest.averages_began.filter(|_| state.averages.is_some());
    let averaged =
        averaged.map(|_| open_averages(folder, &manifest, &replica.stages)).transpose()?;
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
    let averages_began = set_averages(&manifest, averaged.as_ref(), replica, state)?;
    Ok(Manifest {
        step: manifest.step,
        samples_seen: manifest.samples_seen,
        guard: manifest.guard,
        lr: manifest.lr,
        averages_began,
        ..configured.clone()
    })
}

/// Sets the averages, given the files that hold them, or begins them as the weights. Returns the
/// update after which they began.
fn set_averages(
    manifest: &Manifest,
    parts: Option<&Shards>,
    replica: &Replica<'_>,
    state: &mut OptimizerState,
) -> Result<Option<u64>> {
    let step = manifest.step;
    let Some(averages) = &mut state.averages else {
        if manifest.averages_began.is_some() {
            tracing::warn!(
                "the averages of the weights are dropped at step {step}: [ema] is not set"
            );
        }
        return Ok(None);
    };
    let Some(parts) = parts else {
        averages.begin(replica, manifest.guard.update_number(step));
        tracing::info!("the averages of the weights begin at step {step}, as its weights");
        return Ok(Some(averages.began));
    };
    for (index, stage) in replica.stages.iter().enumerate() {
        let read = pretrained::flat(stage.params().trained(), |info| parts.read(&info.name))?;
        averages.set(index, &read, &replica.buckets[index]);
    }
    averages.began = manifest.averages_began.unwrap_or_default();
    Ok(manifest.averages_began)
}

/// Loads only the trained parameters, as they are or averaged. `base`: what the frozen ones are.
///
/// # Errors
/// As [`open_parameters`].
pub fn load_parameters(
    folder: &Path,
    config: &RunConfig,
    weights: SavedWeights,
    base: Option<&Base>,
    replica: &mut Replica<'_>,
) -> Result<()> {
    if let Some(what) = verify::manifest(folder)?.other_base(base) {
        return Err(Error::checkpoint_mismatch(folder, what));
    }
    set_parameters(&open_parameters(folder, config, weights, &replica.stages)?, replica)
}

/// Returns the number of steps that a checkpoint's run had done.
///
/// # Errors
/// [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn step_of(folder: &Path) -> Result<u64> {
    Ok(verify::manifest(folder)?.step)
}

/// True if a checkpoint holds averages of its weights.
///
/// # Errors
/// [`Error::CheckpointMismatch`], [`Error::Storage`].
pub fn has_averages(folder: &Path) -> Result<bool> {
    Ok(verify::manifest(folder)?.averages_began.is_some())
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

/// Opens the files that hold the trained parameters or their averages, and checks that they contain
/// those of the stages in f32 and nothing else.
///
/// # Errors
/// As [`load`]; [`Error::Config`] if there are no averages.
pub fn open_parameters(
    folder: &Path,
    config: &RunConfig,
    weights: SavedWeights,
    stages: &[Box<dyn Stage>],
) -> Result<Shards> {
    let manifest = verify::manifest(folder)?;
    // Format version 2 has no record, so the configuration in the run folder is used.
    let other =
        manifest.config.as_ref().and_then(|record| changes::other_architecture(record, config));
    other.map_or(Ok(()), |what| Err(Error::checkpoint_mismatch(folder, what)))?;
    if weights == SavedWeights::Averaged {
        return open_averages(folder, &manifest, stages);
    }
    let parts = open_parts(folder, &manifest, |file| file.starts_with("model-"))?;
    check_keys(folder, &parts, stages, &[])?;
    Ok(parts)
}

fn open_averages(folder: &Path, manifest: &Manifest, stages: &[Box<dyn Stage>]) -> Result<Shards> {
    if manifest.averages_began.is_none() {
        let what =
            format!("{} holds no averages of its weights: [ema] was not set", folder.display());
        return Err(Error::config("--ema", what));
    }
    let parts = open_parts(folder, manifest, is_averages)?;
    check_keys(folder, &parts, stages, &[])?;
    Ok(parts)
}

fn is_averages(file: &str) -> bool {
    file.split('-').next() == Some(AVERAGES)
}

/// Opens the files whose names are wanted.
fn open_parts(
    folder: &Path,
    manifest: &Manifest,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<Shards> {
    let wanted = manifest.parts.iter().map(|part| part.file.clone()).filter(|file| is_wanted(file));
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
