//! The draws of a run: the streams of randomness that a micro-batch's numbers come from.

use tch::Tensor;

use crate::config::RunConfig;
use crate::data::{Batch, Place, Steps};
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
    steps: Steps,
    is_stratified: bool,
    /// True if inputs of low-rank changes are dropped.
    drops: bool,
}

impl RunDraws {
    pub fn new(config: &RunConfig, pipeline: &FlowMatchingPipeline, steps: Steps) -> Self {
        RunDraws {
            rules: pipeline.draw_rules(),
            seed: config.seed,
            seed_scope: config.parallel.seed_scope,
            steps,
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

    /// A sample that a global batch has several times gets other numbers each time.
    fn stream(&self, place: Place, batch: &Batch) -> Stream {
        let key = Key::new(self.seed, Purpose::FlowMatching).step(place.step);
        match self.seed_scope {
            SeedScope::Rank => {
                let rank = self.steps.share(place.step).rank as u64;
                Stream::Batch(key.micro_batch(place.micro_batch as u64).scope(rank))
            }
            SeedScope::Sample => {
                let copies = self.steps.copies(place).into_iter();
                let keys = batch.sample_ids.iter().zip(copies);
                // A sample's stream has no micro-batch of its own: copies are told apart by it.
                Stream::PerSample(keys.map(|(id, copy)| key.scope(*id).micro_batch(copy)).collect())
            }
        }
    }

    /// Returns the numbers from which dropped inputs follow, one for each sample, if any are
    /// dropped: they do not depend on the seed's scope, so that every split drops the same.
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
        let share = self.steps.share(step);
        let (size, total) = (share.micro_batch_size, share.global_batch());
        let shuffled =
            Key::new(self.seed, Purpose::Stratification).step(step).permutation(total as u64);
        let first = share.block(micro_batch) * size;
        Some(Strata { positions: shuffled[first..first + size].to_vec(), total: total as u64 })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tch::Device;

    use super::*;
    use crate::assembly::{build_pipeline, dataset, order};
    use crate::data::{Share, Steps};

    #[test]
    fn copies_in_one_global_batch_draw_apart_and_the_first_of_them_as_ever() {
        let overrides = ["train.global_batch_size=4096", "data.on_small_group=repeat"];
        let overrides = overrides.map(ToString::to_string);
        let config = RunConfig::read("test", crate::config::DEFAULT, &overrides).expect("sound");
        let data = dataset(&config).expect("the digits");
        let draws_of = |rank: usize, world_size: usize| {
            let share = Share {
                rank,
                world_size,
                micro_batches: 4096 / 16 / world_size,
                micro_batch_size: 16,
                neighbours: false,
            };
            let order = order(&config, &data, world_size).expect("a group that is filled");
            let steps = Steps::alike(order, share);
            (RunDraws::new(&config, &build_pipeline(&config, Device::Cpu), steps.clone()), steps)
        };
        let keys = |world_size: usize| -> Vec<(u64, Key)> {
            let mut keys = Vec::new();
            for rank in 0..world_size {
                let (draws, steps) = draws_of(rank, world_size);
                for place in steps.places_after(2).take_while(|place| place.step == 3) {
                    let ids = steps.sample_ids(place);
                    let batch =
                        Batch { sample_ids: ids.clone(), ..data.batch(&ids).expect("sound") };
                    let Stream::PerSample(of_batch) = draws.stream(place, &batch) else {
                        panic!("a stream for each sample")
                    };
                    keys.extend(ids.into_iter().zip(of_batch));
                }
            }
            keys.sort_by_key(|(id, key)| (*id, key.micro_batch));
            keys
        };
        let found = keys(1);
        let distinct: BTreeSet<u64> = found.iter().map(|(_, key)| key.hash()).collect();
        assert_eq!((found.len(), distinct.len()), (4096, 4096), "no two draw alike");
        let samples: BTreeSet<u64> = found.iter().map(|(id, _)| *id).collect();
        for id in &samples {
            let usual = Key::new(config.seed, Purpose::FlowMatching).step(3).scope(*id);
            assert!(found.contains(&(*id, usual)), "sample {id} draws once as if it were alone");
        }
        assert_eq!(samples.len(), 1797);
        assert!(keys(2) == found, "on two ranks as on one");
    }
}
