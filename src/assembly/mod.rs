//! Builds the computing parts from the configuration: a rank's device and communicator, its data
//! and its share of a batch, its replica, its pipeline.

pub mod attention;
pub mod device;

use tch::Device;

use crate::collective::Collective;
use crate::config::RunConfig;
use crate::data::{Dataset, Share};
use crate::error::Result;
use crate::flow::{FlowMatchingPipeline, ImageTokens};
use crate::parallel::{Devices, Replica, Sharing};
use crate::rng::{Key, Purpose};
use crate::run::pretrained;

/// Opens the configured dataset, with the configured treatment of bad samples and of texts of
/// unequal length.
///
/// # Errors
/// Errors of [`Dataset::named`]; [`Error::Data`](crate::error::Error::Data) if a text is longer than
/// `data.text_tokens`.
pub fn dataset(config: &RunConfig) -> Result<Dataset> {
    config.data.dataset()?.on_bad(config.data.on_bad).text_padding(config.text_padding())
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
