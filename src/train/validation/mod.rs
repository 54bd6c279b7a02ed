//! The loss of samples that are not trained on, at fixed noise levels.
//!
//! Each sample has noise of its own, the same at every validation and every noise level; conditions
//! and inputs of low-rank changes are never dropped. Blocks of samples are computed in turns by all
//! ranks, and summed in their own order in f64, so that the loss has the same bits at every number
//! of ranks.
//!
//! Beside it stands the reference's `val_loss`: the objective of training, with its weights, its
//! noise levels and its dropout of conditions, drawn alike each time. The reference draws by the
//! seed and the rank; here each sample has its own draws, so that the number does not depend on how
//! many ranks there are.
//!
//! | question | file |
//! |---|---|
//! | what is computed | `mod.rs` |
//! | when, and what becomes of it | `turn.rs` |
//! | how it is told | `told.rs` |

mod told;
mod turn;

pub use told::{Judgement, LOSS, figures};

use std::sync::Arc;
use std::time::Instant;

use tch::{Device, Kind, Tensor, no_grad};

use crate::assembly::validation::{Block, ValidationSet};
use crate::collective::{Collective, Sliced};
use crate::config::RunConfig;
use crate::data::{Batch, Loaded, Loader};
use crate::error::Result;
use crate::flow::{DrawRules, Drawn, DrawnNoise, FlowMatchingPipeline, StepOptions, StepOutput};
use crate::parallel::Replica;
use crate::rng::{Key, Purpose, Stream};

/// A loss and the share of the samples that masks keep of it, each summed over samples.
const SUMS: i64 = 2;

/// Judges models by the validation set of a run.
pub struct Validator {
    set: ValidationSet,
    rules: DrawRules,
    seed: u64,
    /// Batches that are read ahead.
    prefetch: usize,
}

/// The random numbers of a block.
struct BlockDraws {
    noise: DrawnNoise,
    /// As training draws them.
    of_training: Drawn,
}

impl Validator {
    pub fn new(config: &RunConfig, set: ValidationSet, pipeline: &FlowMatchingPipeline) -> Self {
        // A sample's numbers are to be the same on every device.
        let rules = pipeline.draw_rules().on_host();
        Validator { set, rules, seed: config.seed, prefetch: config.data.prefetch }
    }

    pub fn set(&self) -> &ValidationSet {
        &self.set
    }

    /// Judges a model, whose parameters stay as they are. `go_on` is called before each block.
    ///
    /// # Errors
    /// Errors of the data, the collectives and `go_on`.
    ///
    /// # Ordering
    /// Every rank calls it. Ranks without a block of their own repeat one, so that all take part in
    /// gathering each stage's parameters.
    pub fn judge(
        &self,
        replica: &Replica<'_>,
        pipeline: &FlowMatchingPipeline,
        collective: &dyn Collective,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<Judgement> {
        let began = Instant::now();
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let own: Vec<usize> = (0..self.set.rounds(world_size))
            .map(|round| self.set.block_of(round, rank, world_size))
            .collect();
        let mut loader = self.loader(&own)?;
        let mut rows = Vec::with_capacity(own.len());
        for index in own {
            go_on()?;
            let Loaded { batch, ahead } = loader.next_batch()?;
            let block = &self.set.blocks[index];
            rows.push(sums(block, &batch, ahead.wait()?, replica, pipeline)?);
        }
        let by_block = gathered(&rows, self.set.blocks.len(), collective)?;
        Ok(Judgement::new(&self.set, &by_block, began.elapsed().as_secs_f64()))
    }

    /// Reads these blocks and draws their numbers ahead.
    fn loader(&self, own: &[usize]) -> Result<Loader<BlockDraws>> {
        let batches: Vec<Vec<u64>> =
            own.iter().map(|index| self.set.blocks[*index].ids.clone()).collect();
        let (rules, seed, dataset) = (self.rules.clone(), self.seed, Arc::clone(&self.set.dataset));
        let make = move |_: usize, batch: &Batch| {
            let keys = |number: u64| {
                let key = Key::new(seed, Purpose::Validation).micro_batch(number);
                let key = |id: &u64| key.scope(dataset.sample_hash(*id));
                Stream::PerSample(batch.sample_ids.iter().map(key).collect())
            };
            let noise = rules.draw_noise(batch, &keys(0))?;
            let of_training = rules.draw(batch, &keys(1), None)?;
            Ok(BlockDraws { noise, of_training })
        };
        Loader::of_samples(Arc::clone(&self.set.dataset), batches, self.prefetch, make)
    }
}

/// Returns the sums of a block, `[levels + 1, 2]` f64: its squared errors at each noise level, then
/// the objective of training, each beside the shares that masks keep.
fn sums(
    block: &Block,
    batch: &Batch,
    draws: BlockDraws,
    replica: &Replica<'_>,
    pipeline: &FlowMatchingPipeline,
) -> Result<Tensor> {
    let (samples, device) = (block.ids.len() as i64, pipeline.device());
    let step = |drawn: Drawn| {
        let options = StepOptions { collect_metrics: false, check_loss: false, global_step: 0 };
        no_grad(|| pipeline.step_after_draws(|inputs| replica.infer(inputs), batch, drawn, options))
    };
    let summed = |values: &Tensor| values.sum(Kind::Double);
    let kept = |output: &StepOutput| summed(&output.loss.kept.share_of_samples(samples, device));
    let noise = draws.noise.on(device);
    let mut sums = Vec::with_capacity(2 * (block.sigmas.len() + 1));
    for sigma in &block.sigmas {
        let output = step(noise.at(*sigma))?;
        sums.extend([summed(&pipeline.squared_errors(&output)), kept(&output)]);
    }
    let output = step(draws.of_training.on(device))?;
    sums.extend([output.loss.objective.to_kind(Kind::Double) * samples, kept(&output)]);
    Ok(Tensor::stack(&sums, 0).view([-1, SUMS]))
}

/// Returns the sums of all blocks in their order, each as rows of a loss and what is kept of it.
///
/// # Ordering
/// Every rank calls it with as many rows.
fn gathered(
    rows: &[Tensor],
    blocks: usize,
    collective: &dyn Collective,
) -> Result<Vec<Vec<[f64; SUMS as usize]>>> {
    let own = Tensor::stack(rows, 0);
    let (world_size, size) = (collective.world_size(), own.size());
    let all = Tensor::zeros([&[world_size as i64], &size[..]].concat(), (own.kind(), own.device()));
    collective.all_gather(vec![Sliced { owned: own, full: all.shallow_clone() }])?.wait()?;
    let numbers = all.to_device(Device::Cpu).flatten(0, -1);
    let numbers = Vec::<f64>::try_from(numbers).expect("f64 sums");
    let width = (size[1] * SUMS) as usize;
    let row = |block: usize| {
        let place = (block % world_size) * rows.len() + block / world_size;
        let (pairs, _) = numbers[place * width..][..width].as_chunks();
        pairs.to_vec()
    };
    Ok((0..blocks).map(row).collect())
}
