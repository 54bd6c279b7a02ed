//! The draws of a run: the streams of randomness that a micro-batch's numbers come from.

use tch::Tensor;

use crate::config::RunConfig;
use crate::data::{Batch, Place, Share};
use crate::error::Result;
use crate::fault;
use crate::flow::{DrawRules, Drawn, FlowMatchingPipeline, Strata};
use crate::parallel::SeedScope;
use crate::phase::Phase;
use crate::pulse;
use crate::rng::{Key, Purpose, Stream};

/// Draws the numbers of any micro-batch, on any thread: they follow from its place in training, its
/// samples' ids and its shapes.
#[derive(Clone, Debug)]
pub struct RunDraws {
    rules: DrawRules,
    seed: u64,
    seed_scope: SeedScope,
    share: Share,
    is_stratified: bool,
    /// True if inputs of low-rank changes are dropped.
    drops: bool,
}

impl RunDraws {
    pub fn new(config: &RunConfig, pipeline: &FlowMatchingPipeline, share: Share) -> Self {
        RunDraws {
            rules: pipeline.draw_rules(),
            seed: config.seed,
            seed_scope: config.parallel.seed_scope,
            share,
            is_stratified: pipeline.settings().stratified_timesteps,
            drops: config.lora.rank.is_some() && config.lora.dropout > 0.0,
        }
    }

    /// Draws now, on the caller's thread.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if the batch has no latents.
    pub fn draw(&self, place: Place, batch: &Batch) -> Result<Drawn> {
        let (stream, strata) = (self.stream(place, batch), self.strata(place));
        self.rules.draw(batch, &stream, strata.as_ref())
    }

    /// Draws ahead of the step, on a thread of the loader; `None` if the numbers come from a GPU's
    /// generator.
    ///
    /// # Errors
    /// As [`draw`](Self::draw), and an error that is injected.
    pub fn draw_ahead(&self, place: Place, batch: &Batch) -> Result<Option<Drawn>> {
        pulse::work_beside(Phase::Draw);
        fault::strike_at(Phase::Draw, place.step);
        fault::error_at(Phase::Draw, place.step)?;
        let (stream, strata) = (self.stream(place, batch), self.strata(place));
        self.rules.draw_ahead(batch, &stream, strata.as_ref())
    }

    fn stream(&self, Place { step, micro_batch }: Place, batch: &Batch) -> Stream {
        let key = Key::new(self.seed, Purpose::FlowMatching).step(step);
        match self.seed_scope {
            SeedScope::Rank => {
                Stream::Batch(key.micro_batch(micro_batch as u64).scope(self.share.rank as u64))
            }
            SeedScope::Sample => {
                Stream::PerSample(batch.sample_ids.iter().map(|&id| key.scope(id)).collect())
            }
        }
    }

    /// Returns the numbers from which dropped inputs follow, one for each sample, if any are dropped:
    /// they do not depend on the seed's scope, so that every split drops the same.
    pub fn dropout_keys(&self, step: u64, batch: &Batch) -> Option<Tensor> {
        let key = Key::new(self.seed, Purpose::Dropout).step(step);
        let keys = || batch.sample_ids.iter().map(|&id| key.scope(id).hash() as i64);
        self.drops.then(|| Tensor::from_slice(&keys().collect::<Vec<_>>()))
    }

    /// Returns a micro-batch's strata of probability, if they are asked for: a slice of the global
    /// batch's, which are shuffled at each step.
    fn strata(&self, Place { step, micro_batch }: Place) -> Option<Strata> {
        if !self.is_stratified {
            return None;
        }
        let (size, total) = (self.share.micro_batch_size, self.share.global_batch());
        let shuffled =
            Key::new(self.seed, Purpose::Stratification).step(step).permutation(total as u64);
        let first = self.share.block(micro_batch) * size;
        Some(Strata { positions: shuffled[first..first + size].to_vec(), total: total as u64 })
    }
}
