//! Builds the computing parts from the configuration: a rank's device and communicator, its data
//! and its share of a batch, its replica, its pipeline.

pub mod attention;
pub mod device;

use tch::Device;

use attention::tokens_of_group;

use crate::collective::Collective;
use crate::config::{MicroBatches, RunConfig};
use crate::data::{Dataset, Group, Order, Share, Steps};
use crate::error::Result;
use crate::flow::{FlowMatchingPipeline, ImageTokens};
use crate::parallel::{Devices, Replica, Sharing};
use crate::rng::{Key, Purpose};
use crate::run::pretrained;

/// Opens the configured data, with the configured treatment of bad samples and of texts of unequal
/// length, and with frames where the model takes videos.
///
/// # Errors
/// Errors of [`Dataset::configured`]; [`Error::Data`](crate::error::Error::Data) if a text is longer
/// than `data.text_tokens`.
pub fn dataset(config: &RunConfig) -> Result<Dataset> {
    Dataset::configured(&config.data)?
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

/// Returns the devices of a rank that computes on `device`.
pub fn devices(config: &RunConfig, device: Device) -> Devices {
    let offloads = config.parallel.offload.optimizer();
    Devices { compute: device, home: if offloads { Device::Cpu } else { device } }
}

/// Builds the configured model with all parameters zero, to be filled from a checkpoint.
pub fn empty_replica<'c>(
    config: &RunConfig,
    device: Device,
    sharing: Sharing<'c>,
) -> Result<Replica<'c>> {
    replica(config, device, sharing, None)
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
) -> Result<Replica<'c>> {
    if let Some(folder) = config.model.pretrained() {
        let mut replica = empty_replica(config, device, sharing)?;
        pretrained::load_pretrained(folder, &config.model.family, &mut replica, collective)?;
        return Ok(replica);
    }
    replica(config, device, sharing, Some(Key::new(config.seed, Purpose::Initialization)))
}

fn replica<'c>(
    config: &RunConfig,
    device: Device,
    sharing: Sharing<'c>,
    key: Option<Key>,
) -> Result<Replica<'c>> {
    let (stages, kind) = (config.model.family.stages()?, config.model.dtype.kind());
    Ok(Replica::shared(stages, kind, devices(config, device), key, sharing))
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
