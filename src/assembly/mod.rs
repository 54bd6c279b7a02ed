//! Builds the computing parts from the configuration: a rank's device and communicator, its data
//! and its share of a batch, its replica, its pipeline.

pub mod attention;
pub mod device;
mod kernels;
pub mod validation;

use std::path::Path;

use tch::Device;

use attention::tokens_of_group;

use crate::collective::{Collective, Solo};
use crate::config::{MicroBatches, RunConfig};
use crate::data::{Dataset, Group, Order, Share, Steps};
use crate::error::Result;
use crate::flow::{FlowMatchingPipeline, ImageTokens};
use crate::nn::Stage;
use crate::parallel::{Devices, Replica, Sharing};
use crate::rng::{Key, Purpose};
use crate::run::checkpoint::{self, SavedWeights};
use crate::run::frozen_base::Base;
use crate::run::length::Length;
use crate::run::pretrained::{self, Origin};
use crate::tuning::{all_frozen, with_strength};

/// Opens the configured data, without the samples that are held out of training, with the
/// configured treatment of bad samples and of texts of unequal length, and with frames where the
/// model takes videos.
///
/// # Errors
/// Errors of [`Dataset::configured`] and [`Dataset::holding_out`];
/// [`Error::Data`](crate::error::Error::Data) if a text is longer than `data.text_tokens`.
pub fn dataset(config: &RunConfig) -> Result<Dataset> {
    let dataset = Dataset::configured(&config.data)?.holding_out(config.validation.share)?;
    as_configured(config, dataset)
}

fn as_configured(config: &RunConfig, dataset: Dataset) -> Result<Dataset> {
    dataset
        .with_frames(config.model.family.takes_frames())
        .on_bad(config.data.on_bad)
        .text_padding(config.text_padding())
}

/// Returns the order in which a run of so many ranks takes the samples.
///
/// # Errors
/// Errors of [`RunConfig::global_batch`] and [`Order::of`].
pub fn order(config: &RunConfig, dataset: &Dataset, world_size: usize) -> Result<Order> {
    let global_batch = config.global_batch(world_size)?;
    Order::of(dataset, global_batch, config.seed, config.data.on_small_group)
}

/// Returns the samples and micro-batches of each step on this rank.
///
/// # Errors
/// Errors of [`order`].
pub fn steps(config: &RunConfig, dataset: &Dataset, collective: &dyn Collective) -> Result<Steps> {
    let world_size = collective.world_size();
    let share = |group: &Group| {
        let tokens = tokens_of_group(config, dataset, group);
        let MicroBatches { count, samples } = config.micro_batches(tokens, world_size)?;
        Ok(Share {
            rank: collective.rank(),
            world_size,
            micro_batches: count,
            micro_batch_size: samples,
            neighbours: config.parallel.neighbours_to_one_rank(),
        })
    };
    let shares = dataset.groups().iter().map(share).collect::<Result<_>>()?;
    Ok(Steps::by_group(order(config, dataset, world_size)?, shares))
}

/// Returns the length of a run of so many ranks. The data are opened only if it counts epochs.
///
/// # Errors
/// Errors of [`dataset`] and [`order`].
pub fn length(config: &RunConfig, world_size: usize) -> Result<Length> {
    if config.max_epochs.is_none() {
        return Ok(Length::Steps(config.max_steps));
    }
    let order = order(config, &dataset(config)?, world_size)?;
    let batches = config.num_steps(order.batches_per_epoch());
    Ok(Length::Epochs { batches, global_batch: config.global_batch(world_size)? as u64 })
}

/// Returns the devices of a rank that computes on `device`.
pub fn devices(config: &RunConfig, device: Device) -> Devices {
    let offload = config.parallel.offload;
    let home = if offload.optimizer { Device::Cpu } else { device };
    Devices { compute: device, home, streams_frozen: offload.frozen }
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
/// Errors of the checkpoint, also if it lacks the averages that are asked for, and of the folder
/// with the frozen parameters.
pub fn trained_replica(
    config: &RunConfig,
    checkpoint: &Path,
    weights: SavedWeights,
    device: Device,
    strength: f64,
) -> Result<Replica<'static>> {
    let begun = replica_for_checkpoint(config, device, Sharing::alone(), &Solo)?;
    let Begun { mut replica, base } = begun;
    checkpoint::load_parameters(checkpoint, config, weights, base.as_ref(), &mut replica)?;
    replica.stages = with_strength(replica.stages, strength);
    Ok(replica)
}

/// Builds the model of a configuration with its pretrained weights, of which none will be trained,
/// on this rank alone.
///
/// # Errors
/// A list of every missing, unexpected and misshapen tensor.
pub fn frozen_replica(config: &RunConfig, device: Device) -> Result<Replica<'static>> {
    let mut replica = empty_replica(config, all_frozen(config.stages()?), device, Sharing::alone());
    pretrained::begin(&origin(config), &mut replica, &Solo)?;
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
