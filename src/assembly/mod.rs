//! Builds the computing parts from the configuration: a rank's device and communicator, its data
//! and its share of a batch, its replica, its pipeline.

pub mod attention;
pub mod device;

use std::path::Path;

use tch::Device;

use crate::collective::{Collective, Solo};
use crate::config::RunConfig;
use crate::data::{Dataset, Share};
use crate::error::Result;
use crate::flow::{FlowMatchingPipeline, ImageTokens};
use crate::nn::Stage;
use crate::parallel::{Devices, Replica, Sharing};
use crate::rng::{Key, Purpose};
use crate::run::base::Base;
use crate::run::checkpoint;
use crate::run::pretrained::{self, Origin};
use crate::tuning::with_strength;

/// Opens the configured dataset, with the configured treatment of bad samples and of texts of
/// unequal length.
///
/// # Errors
/// Errors of [`Dataset::named`]; [`Error::Data`](crate::error::Error::Data) if a text is longer than
/// `data.text_tokens`.
pub fn dataset(config: &RunConfig) -> Result<Dataset> {
    Dataset::named(&config.data.path)?
        .on_bad(config.data.on_bad)
        .text_padding(config.text_padding())
}

/// Returns this rank's share of the global batch.
pub fn share_of(config: &RunConfig, collective: &dyn Collective) -> Result<Share> {
    Ok(Share {
        rank: collective.rank(),
        world_size: collective.world_size(),
        micro_batches: config.micro_batches(collective.world_size())?,
        micro_batch_size: config.data.micro_batch_size_per_gpu,
        neighbours: config.parallel.neighbours_to_one_rank(),
    })
}

/// Returns the devices of a rank that computes on `device`.
pub fn devices(config: &RunConfig, device: Device) -> Devices {
    let offloads = config.parallel.offload.optimizer();
    Devices { compute: device, home: if offloads { Device::Cpu } else { device } }
}

/// A model, and what its frozen parameters are, if it has any.
pub struct Begun<'c> {
    pub replica: Replica<'c>,
    pub base: Option<Base>,
}

/// Builds the configured model with its initial parameters: pretrained, or following from the seed
/// alone.
///
/// # Ordering
/// Every rank calls it.
pub fn fresh_replica<'c>(
    config: &RunConfig,
    device: Device,
    sharing: Sharing<'c>,
    collective: &dyn Collective,
) -> Result<Begun<'c>> {
    let mut replica = empty_replica(config, config.stages()?, device, sharing);
    let base = pretrained::begin(&origin(config), &mut replica, collective)?;
    Ok(Begun { replica, base })
}

/// Builds the configured model for a checkpoint, from which its trained parameters come next: they
/// are what they begin as, or zero where nothing is frozen.
///
/// # Ordering
/// Every rank calls it.
pub fn replica_for_checkpoint<'c>(
    config: &RunConfig,
    device: Device,
    sharing: Sharing<'c>,
    collective: &dyn Collective,
) -> Result<Begun<'c>> {
    let mut replica = empty_replica(config, config.stages()?, device, sharing);
    if config.tuning().is_whole() {
        return Ok(Begun { replica, base: None });
    }
    // What a LoRA began with is trained, and comes from the checkpoint.
    let origin = Origin { lora: None, ..origin(config) };
    let base = pretrained::begin(&origin, &mut replica, collective)?;
    Ok(Begun { replica, base })
}

fn origin(config: &RunConfig) -> Origin<'_> {
    Origin {
        family: &config.model.family,
        folder: config.model.pretrained(),
        lora: config.lora.init_from.as_deref().map(Path::new),
        key: Key::new(config.seed, Purpose::Initialization),
    }
}

/// Builds the model of a run with the parameters of one of its checkpoints, on this rank alone.
/// `strength`: factor of its low-rank changes.
///
/// # Errors
/// Errors of the checkpoint, and of the folder with the frozen parameters.
pub fn trained_replica(
    config: &RunConfig,
    checkpoint: &Path,
    device: Device,
    strength: f64,
) -> Result<Replica<'static>> {
    let begun = replica_for_checkpoint(config, device, Sharing::alone(), &Solo)?;
    let Begun { mut replica, base } = begun;
    checkpoint::load_parameters(checkpoint, config, base.as_ref(), &mut replica)?;
    replica.stages = with_strength(replica.stages, strength);
    Ok(replica)
}

fn empty_replica<'c>(
    config: &RunConfig,
    stages: Vec<Box<dyn Stage>>,
    device: Device,
    sharing: Sharing<'c>,
) -> Replica<'c> {
    Replica::shared(stages, config.model.dtype.kind(), devices(config, device), None, sharing)
}

pub fn build_pipeline(config: &RunConfig, device: Device) -> FlowMatchingPipeline {
    let (flow, family) = (&config.flow_matching, config.model.family.clone());
    let pipeline = FlowMatchingPipeline::new(
        flow.flow.clone(),
        flow.adapter.build(),
        device,
        config.model.dtype.kind(),
    );
    pipeline.counting_tokens(ImageTokens::new(move |latents| family.image_tokens(latents)))
}
