//! One optimizer step, from top to bottom: micro-batches, reduce, look, clip, update.

use tch::{Device, Kind, Tensor, no_grad};

use super::agreement::known_to_all;
use crate::collective::{Collective, Sliced};
use crate::config::RunConfig;
use crate::data::{Batch, Loader};
use crate::error::{Error, Result};
use crate::flow::{FlowMatchingPipeline, Statistics, StepOptions, StepOutput, Strata, TaskType, check_loss};
use crate::optim::{Optimizer, Slice, clip};
use crate::parallel::{Reducer, Replica, SeedScope};
use crate::rng::{Key, Purpose, Stream};
use crate::telemetry::Stopwatch;

/// What a step needs besides the model and its state.
pub struct Stepper<'a> {
    pub config: &'a RunConfig,
    pub collective: &'a dyn Collective,
    pub pipeline: &'a FlowMatchingPipeline,
    pub micro_batches: usize,
    /// Search every stage for non-finite values.
    pub check_stages: bool,
    pub lr: f64,
}

/// What a step did.
#[derive(Debug)]
pub struct Update {
    /// Over all ranks and micro-batches.
    pub statistics: Statistics,
    /// Before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    pub sampling_method: &'static str,
    pub task_type: TaskType,
    pub data_type: &'static str,
    /// Seconds of each phase on this rank.
    pub phases: Vec<(&'static str, f64)>,
}

/// The optimizer's tensors before the first step: zeros, by stage.
pub fn fresh_state(replica: &Replica, optimizer: &dyn Optimizer) -> Vec<Vec<Tensor>> {
    let of_bucket = |master: &Tensor| optimizer.state_names().iter().map(|_| master.zeros_like()).collect();
    replica.buckets.iter().map(|bucket| of_bucket(bucket.master())).collect()
}

impl Stepper<'_> {
    /// Optimizer step `step`, counted from 1.
    ///
    /// # Errors
    /// [`Error::NotFinite`] before anything was updated, on every rank alike; whatever the loader or a collective returns.
    pub fn step(&self, step: u64, loader: &mut Loader, replica: &mut Replica, state: &mut [Vec<Tensor>]) -> Result<Update> {
        let mut watch = Stopwatch::start();
        let mut reducer = Reducer::new(self.collective, replica.stages.len());
        let mut rows = Vec::new();
        let mut last = None;
        for micro_batch in 0..self.micro_batches {
            let batch = loader.next_batch()?;
            watch.lap("data");
            let output = self.forward_backward(step, micro_batch, &batch, replica, &mut reducer, &mut watch)?;
            rows.push(output.statistics.as_ref().expect("metrics are collected each step").shallow_clone());
            last = Some((output.sampling_method, output.task_type, batch.data_type.word()));
        }
        let gradients = reducer.finish()?;
        let norm = clip::global_norm(gradients.iter().flatten());
        let (statistics, grad_norm) = self.agreed_statistics(step, &rows, &norm)?;
        watch.lap("communication");
        self.update(step, &gradients, &norm, replica, state);
        watch.lap("optimizer");
        let (sampling_method, task_type, data_type) = last.expect("a step has micro-batches");
        Ok(Update { statistics, grad_norm, lr: self.lr, sampling_method, task_type, data_type, phases: watch.take() })
    }

    fn forward_backward(
        &self,
        step: u64,
        micro_batch: usize,
        batch: &Batch,
        replica: &Replica,
        reducer: &mut Reducer<'_>,
        watch: &mut Stopwatch,
    ) -> Result<StepOutput> {
        let mut tape = replica.tape(self.config.parallel.recompute).checking_finite(self.check_stages.then_some(step));
        let strata = self.pipeline.settings().stratified_timesteps.then(|| self.strata(step, micro_batch));
        // The loss is checked below, for all ranks at once.
        let options = StepOptions { global_step: step, collect_metrics: true, check_loss: false, strata: strata.as_ref() };
        let stream = self.stream(step, micro_batch, batch);
        let output = self.pipeline.step(|inputs| tape.forward(inputs), batch, &stream, options)?;
        watch.lap("forward");
        // Of the mean over all ranks' micro-batches, so that gradients are summed and never divided.
        let share = &output.loss.average_weighted_loss / (self.micro_batches * self.collective.world_size()) as f64;
        let last = micro_batch + 1 == self.micro_batches;
        tape.backward(&share, |stage, gradient| reducer.add(stage, gradient, last))?;
        watch.lap("backward");
        Ok(output)
    }

    /// Number of a micro-batch within the step over all ranks; its samples stand at this place of the global batch.
    fn block(&self, micro_batch: usize) -> usize {
        micro_batch * self.collective.world_size() + self.collective.rank()
    }

    fn stream(&self, step: u64, micro_batch: usize, batch: &Batch) -> Stream {
        let key = Key::new(self.config.seed, Purpose::FlowMatching).step(step);
        match self.config.parallel.seed_scope {
            SeedScope::Rank => Stream::Batch(key.micro_batch(micro_batch as u64).scope(self.collective.rank() as u64)),
            SeedScope::Sample => Stream::PerSample(batch.sample_ids.iter().map(|&id| key.scope(id)).collect()),
        }
    }

    /// Slices of probability of this micro-batch: the global batch's, shuffled each step.
    fn strata(&self, step: u64, micro_batch: usize) -> Strata {
        let size = self.config.data.micro_batch_size_per_gpu;
        let total = size * self.micro_batches * self.collective.world_size();
        let shuffled = Key::new(self.config.seed, Purpose::Stratification).step(step).permutation(total as u64);
        let first = self.block(micro_batch) * size;
        Strata { positions: shuffled[first..first + size].to_vec(), total: total as u64 }
    }

    /// Gathers every rank's rows in one small collective, the step's only host synchronization, and refuses what must not
    /// reach the parameters.
    fn agreed_statistics(&self, step: u64, rows: &[Tensor], norm: &Tensor) -> Result<(Statistics, f64)> {
        let own = Tensor::cat(&[Tensor::stack(rows, 0).flatten(0, -1), norm.to_device(rows[0].device()).reshape([1])], 0);
        let world_size = self.collective.world_size() as i64;
        let all = Tensor::zeros([world_size, own.size()[0]], (Kind::Float, own.device()));
        self.collective.all_gather(vec![Sliced { owned: own, full: all.shallow_clone() }])?.wait()?;
        let all = Vec::<f32>::try_from(all.to_device(Device::Cpu).flatten(0, -1)).expect("f32 rows");
        let ranks: Vec<&[f32]> = all.chunks(rows.len() * Statistics::WIDTH + 1).collect();
        // In the order of the global batch, so that the sums do not depend on how many ranks shared it.
        let blocks = (0..rows.len()).flat_map(|micro_batch| ranks.iter().enumerate().map(move |(rank, row)| (rank, micro_batch, row)));
        let mut merged: Option<Statistics> = None;
        for (rank, micro_batch, row) in blocks {
            let statistics = Statistics::from_row(&row[micro_batch * Statistics::WIDTH..(micro_batch + 1) * Statistics::WIDTH]);
            if self.config.train.check_loss {
                let named = |error| known_to_all(name_rank(error, rank, &statistics), rank, self.collective);
                check_loss(statistics.loss, step).map_err(named)?;
            }
            merged = Some(merged.map_or_else(|| statistics.clone(), |merged| merged.merge(&statistics)));
        }
        let grad_norm = f64::from(ranks[self.collective.rank()][rows.len() * Statistics::WIDTH]);
        if !grad_norm.is_finite() {
            let what = format!("the gradient's global norm is {grad_norm}; nothing was updated");
            return Err(known_to_all(Error::NotFinite { step, what }, 0, self.collective));
        }
        Ok((merged.expect("a step has micro-batches"), grad_norm))
    }

    fn update(&self, step: u64, gradients: &[Option<Tensor>], norm: &Tensor, replica: &mut Replica, state: &mut [Vec<Tensor>]) {
        let coefficient = clip::coefficient(norm, self.config.train.max_grad_norm);
        for (index, gradient) in gradients.iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let clipped = no_grad(|| gradient * &coefficient);
            let decayed = replica.stages[index].params().decayed_runs();
            replica.buckets[index].update(|params| {
                let slice = Slice { params, gradient: &clipped, state: &mut state[index], decayed: &decayed };
                self.config.optimizer.update(slice, self.lr, step);
            });
        }
    }
}

fn name_rank(error: Error, rank: usize, statistics: &Statistics) -> Error {
    match error {
        Error::NotFinite { step, what } => {
            let sigma = &statistics.sigma;
            Error::NotFinite {
                step,
                what: format!("rank {rank}: {what}; sigma was in [{:.4}, {:.4}]; nothing was updated", sigma.min, sigma.max),
            }
        }
        other => other,
    }
}
