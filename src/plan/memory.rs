//! Memory of a rank at the peak of a step. `fm-dist check` prints these numbers, and the message
//! when memory runs out quotes them.

use tch::Kind;

use crate::config::{MicroBatches, RunConfig};
use crate::error::Result;
use crate::nn::{ParamInfo, ParamSet, Stage, Tokens};
use crate::parallel::{DeviceChoice, ParallelSettings, Recompute, Sharding};
use crate::plan::between::taken_kernels;
use crate::plan::state_layout::StateLayout;
use crate::plan::{Footprint, footprint};

/// Memory of a CPU process besides its model: libtorch, MPI and the program. 145 MiB were measured
/// with an empty model; malloc keeps a little of the larger blocks that are freed.
const PROCESS_BYTES: u64 = 160 << 20;

/// The parts of a rank's memory.
#[derive(Clone, Debug)]
pub struct RankMemory {
    pub layout: StateLayout,
    pub activations: Footprint,
    /// Bytes besides state and activations.
    process: u64,
    /// Bytes of the largest packed weight while a product unpacks it.
    unpacked: u64,
    /// Bytes of a stage's first values on their way into the model, in the memory of the device: as
    /// they are read, and of all of the largest stage.
    loading: u64,
}

impl RankMemory {
    /// Returns the memory of one of `world_size` ranks that train on samples of `tokens`.
    ///
    /// # Errors
    /// As [`RunConfig::micro_batches`].
    pub fn new(
        config: &RunConfig,
        stages: &[Box<dyn Stage>],
        tokens: Tokens,
        world_size: usize,
    ) -> Result<Self> {
        let kind = config.model.dtype.kind();
        let MicroBatches { count, samples } = config.micro_batches(tokens, world_size)?;
        let samples = samples as i64;
        let infos = stages.iter().flat_map(|stage| stage.params().infos());
        let unpacked = infos.filter_map(ParamInfo::packed).map(|it| it.unpacking_bytes(kind));
        let is_on_host = config.parallel.device == DeviceChoice::Cpu;
        Ok(RankMemory {
            layout: StateLayout {
                stages: stages.iter().map(|stage| stage.params().num_trained() as u64).collect(),
                frozen: stages.iter().map(|stage| frozen_bytes(stage.params(), kind)).collect(),
                compute_bytes: kind.elt_size_in_bytes() as u64,
                optimizer_tensors: config.optimizer.rule.state_names().len() as u64,
                average_bytes: config.ema.bytes(),
                micro_batches: count as u64,
                reduce_dtype: config.parallel.reduce_dtype,
                kernels: taken_kernels(config),
            },
            activations: footprint(stages, config.model.family.width(), tokens, samples, kind),
            process: if is_on_host { PROCESS_BYTES } else { 0 },
            unpacked: unpacked.max().unwrap_or(0) as u64,
            loading: if is_on_host { loading_bytes(stages, kind) } else { 0 },
        })
    }

    /// Returns the memory of the samples that take most, given the tokens of all kinds of samples,
    /// and the place of these; of the first ones where several take as much.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    /// # Panics
    /// If there are no samples (a bug in the caller).
    pub fn largest(
        config: &RunConfig,
        stages: &[Box<dyn Stage>],
        samples: &[Tokens],
        world_size: usize,
    ) -> Result<(usize, Self)> {
        let mut largest: Option<(u64, usize, RankMemory)> = None;
        for (place, tokens) in samples.iter().enumerate() {
            if samples[..place].contains(tokens) {
                continue;
            }
            let memory = RankMemory::new(config, stages, *tokens, world_size)?;
            let bytes = memory.on_device(&config.parallel, world_size as u64);
            if largest.as_ref().is_none_or(|(most, ..)| bytes > *most) {
                largest = Some((bytes, place, memory));
            }
        }
        let (_, place, memory) = largest.expect("data have samples");
        Ok((place, memory))
    }

    /// Returns the bytes of a rank in the memory of its device at the peak of a step, or while the
    /// model gets its first values, where that takes more: on a CPU, of a model that is frozen.
    pub fn on_device(&self, parallel: &ParallelSettings, world_size: u64) -> u64 {
        let ParallelSettings { sharding, offload, .. } = *parallel;
        let step = self.layout.bytes_per_rank(sharding, offload, world_size)
            + self.activations.on_device(effective_recompute(parallel), offload)
            + self.unpacked;
        let begin = self.layout.values_per_rank(sharding, offload, world_size) + self.loading;
        step.max(begin) + self.process
    }

    /// Returns the bytes of a rank in the memory of its device while samples are judged: its state,
    /// without gradients, and `forward` bytes of activations.
    pub fn judging(&self, parallel: &ParallelSettings, world_size: u64, forward: u64) -> u64 {
        let ParallelSettings { sharding, offload, .. } = *parallel;
        let resting = self.layout.resting_bytes(sharding, offload, world_size);
        resting + forward + self.unpacked + self.process
    }

    /// Returns the bytes of host memory that a rank's offloaded state takes.
    pub fn on_host(&self, parallel: &ParallelSettings, world_size: u64) -> u64 {
        let ParallelSettings { sharding, offload, .. } = *parallel;
        self.layout.offloaded_bytes(sharding, offload, world_size)
            + self.activations.on_host(effective_recompute(parallel), offload)
    }
}

/// Sharded parameters are gathered again for each use, so their graphs cannot be kept.
fn effective_recompute(parallel: &ParallelSettings) -> Recompute {
    match parallel.sharding {
        Sharding::Parameters => Recompute::Always,
        _ => parallel.recompute,
    }
}

/// Bytes of the largest stage's first values, f32, and of what is made of them one by one: values
/// that are read, or packed weights, of which the whole stage's come together.
fn loading_bytes(stages: &[Box<dyn Stage>], kind: Kind) -> u64 {
    let of_stage = |params: &ParamSet| {
        let read = params.infos().iter().map(|info| 4 * info.numel()).max().unwrap_or(0);
        let packed = || params.infos().iter().filter_map(ParamInfo::packed);
        let packing = packed().map(|weight| weight.packing_bytes()).max().unwrap_or(0);
        let words = if packing == 0 { 0 } else { frozen_bytes(params, kind) };
        4 * params.numel() as u64 + (read as u64).max(packing as u64 + words)
    };
    stages.iter().map(|stage| of_stage(stage.params())).max().unwrap_or(0)
}

/// Bytes of a stage's frozen parameters as they are held where the model computes in `kind`.
fn frozen_bytes(params: &ParamSet, kind: Kind) -> u64 {
    let classes = params.classes(kind);
    let frozen = classes.iter().filter(|class| class.frozen);
    frozen.map(|class| class.length() as u64 * class.kind.elt_size_in_bytes() as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;
    use crate::parallel::{Offload, Offloaded};

    #[test]
    fn boundaries_wait_on_the_host_where_activations_are_offloaded() {
        let stages = crate::model::Dit::default().stages().expect("sound");
        let found = footprint(&stages, 128, Tokens { image: 16, text: 0 }, 4, tch::Kind::Float);
        let device = |recompute, offload| found.on_device(recompute, offload);
        let recomputed = device(Recompute::Always, Offload::NONE);
        assert!(recomputed < device(Recompute::Every(2), Offload::NONE));
        assert!(
            device(Recompute::Every(2), Offload::NONE) < device(Recompute::Never, Offload::NONE)
        );
        let offloaded = device(Recompute::Always, Offload::ALL);
        assert_eq!(
            recomputed - offloaded,
            found.on_host(Recompute::Always, Offload::ALL) - 2 * found.boundary
        );
        assert_eq!(found.on_host(Recompute::Always, Offload::NONE.with(Offloaded::Optimizer)), 0);
    }
}
