//! One optimizer step, from top to bottom: micro-batches, reduce, look, clip, update.

use tch::{Device, Kind, Tensor, no_grad};

use super::agreement::known_to_all;
use super::state::OptimizerState;
use crate::collective::{Collective, Sliced, Spent};
use crate::config::RunConfig;
use crate::data::{Batch, Loader, Share};
use crate::error::{Error, Result};
use crate::flow::{FlowMatchingPipeline, Statistics, StepOptions, StepOutput, Strata, TaskType, check_loss};
use crate::optim::clip;
use crate::parallel::{Layout, Reducer, Replica, SeedScope};
use crate::rng::{Key, Purpose, Stream};
use crate::telemetry::Stopwatch;

/// What a step needs besides the model and its state.
pub struct Stepper<'a> {
    pub config: &'a RunConfig,
    pub collective: &'a dyn Collective,
    pub pipeline: &'a FlowMatchingPipeline,
    pub share: Share,
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
    /// Seconds of collectives on this rank, in whatever phase.
    pub spent: Spent,
}

impl Stepper<'_> {
    /// Optimizer step `step`, counted from 1.
    ///
    /// # Errors
    /// [`Error::NotFinite`] before anything was updated, on every rank alike; whatever the loader or a collective returns.
    pub fn step(&self, step: u64, loader: &mut Loader, replica: &mut Replica<'_>, state: &mut OptimizerState) -> Result<Update> {
        let mut watch = Stopwatch::start();
        // What was spent since the last step, e.g. on a checkpoint, is not this one's.
        self.spent(replica);
        let parallel = &self.config.parallel;
        let mut reducer = Reducer::new(&replica.sharing, &replica.buckets, parallel.reduce_dtype, parallel.summation());
        let mut rows = Vec::new();
        let mut last = None;
        for micro_batch in 0..self.share.micro_batches {
            let batch = loader.next_batch()?;
            watch.lap("data");
            let output = self.forward_backward(step, micro_batch, &batch, replica, &mut reducer, &mut watch)?;
            rows.push(output.statistics.as_ref().expect("metrics are collected each step").shallow_clone());
            last = Some((output.sampling_method, output.task_type, batch.data_type.word()));
        }
        let gradients = reducer.finish()?;
        let norms = self.norms_of_grains(&gradients, replica);
        let (statistics, grad_norm) = self.agreed_statistics(step, &rows, &norms, replica)?;
        watch.lap("reduce");
        self.update(step, &gradients, grad_norm, replica, state)?;
        watch.lap("optimizer");
        let (sampling_method, task_type, data_type) = last.expect("a step has micro-batches");
        Ok(Update {
            statistics,
            grad_norm,
            lr: self.lr,
            sampling_method,
            task_type,
            data_type,
            phases: watch.take(),
            spent: self.spent(replica),
        })
    }

    fn spent(&self, replica: &Replica<'_>) -> Spent {
        self.collective.spent() + replica.sharing.spent()
    }

    fn forward_backward(
        &self,
        step: u64,
        micro_batch: usize,
        batch: &Batch,
        replica: &Replica<'_>,
        reducer: &mut Reducer<'_>,
        watch: &mut Stopwatch,
    ) -> Result<StepOutput> {
        let parallel = &self.config.parallel;
        let tape = replica.tape(parallel.recompute).offloading(parallel.offload.activations());
        let mut tape = tape.checking_finite(self.check_stages.then_some(step));
        let strata = self.pipeline.settings().stratified_timesteps.then(|| self.strata(step, micro_batch));
        // The loss is checked below, for all ranks at once.
        let options = StepOptions { global_step: step, collect_metrics: true, check_loss: false, strata: strata.as_ref() };
        let stream = self.stream(step, micro_batch, batch);
        let output = self.pipeline.step(|inputs| tape.forward(inputs), batch, &stream, options)?;
        watch.lap("forward");
        // Of the mean over all ranks' micro-batches, so that gradients are summed and never divided.
        let share = &output.loss.average_weighted_loss / (self.share.micro_batches * self.share.world_size) as f64;
        let last = micro_batch + 1 == self.share.micro_batches;
        tape.backward(&share, |stage, gradients| reducer.add(stage, gradients, last))?;
        watch.lap("backward");
        Ok(output)
    }

    fn stream(&self, step: u64, micro_batch: usize, batch: &Batch) -> Stream {
        let key = Key::new(self.config.seed, Purpose::FlowMatching).step(step);
        match self.config.parallel.seed_scope {
            SeedScope::Rank => Stream::Batch(key.micro_batch(micro_batch as u64).scope(self.share.rank as u64)),
            SeedScope::Sample => Stream::PerSample(batch.sample_ids.iter().map(|&id| key.scope(id)).collect()),
        }
    }

    /// Slices of probability of this micro-batch: the global batch's, shuffled each step.
    fn strata(&self, step: u64, micro_batch: usize) -> Strata {
        let (size, total) = (self.share.micro_batch_size, self.share.global_batch());
        let shuffled = Key::new(self.config.seed, Purpose::Stratification).step(step).permutation(total as u64);
        let first = self.share.block(micro_batch) * size;
        Strata { positions: shuffled[first..first + size].to_vec(), total: total as u64 }
    }

    /// Norm of each grain that this rank measures, over all stages, f32 scalars.
    fn norms_of_grains(&self, gradients: &[Vec<Tensor>], replica: &Replica<'_>) -> Vec<Tensor> {
        let layouts = replica.buckets.iter().map(|bucket| bucket.pieces().iter().map(|piece| piece.layout()));
        let of_piece = |(layout, gradient): (Layout, &Tensor)| {
            layout.grains().map(|grain| gradient.narrow(0, grain.start, grain.end - grain.start)).collect::<Vec<_>>()
        };
        let grains: Vec<Vec<Tensor>> = layouts.zip(gradients).flat_map(|(layouts, pieces)| layouts.zip(pieces).map(of_piece)).collect();
        let nth = |grain: usize| grains.iter().map(move |grains| &grains[grain]);
        (0..self.config.parallel.grains(self.share.micro_batches)).map(|grain| clip::global_norm(nth(grain))).collect()
    }

    /// Gathers every rank's rows in one small collective, the step's only host synchronization, and refuses what must not
    /// reach the parameters. Returns the gradient's global norm beside the statistics.
    fn agreed_statistics(&self, step: u64, rows: &[Tensor], norms: &[Tensor], replica: &Replica<'_>) -> Result<(Statistics, f64)> {
        let device = rows[0].device();
        let norms: Vec<Tensor> = norms.iter().map(|norm| norm.to_device(device)).collect();
        let own = Tensor::cat(&[Tensor::stack(rows, 0).flatten(0, -1), Tensor::stack(&norms, 0)], 0);
        let all = Tensor::zeros([self.share.world_size as i64, own.size()[0]], (Kind::Float, device));
        self.collective.all_gather(vec![Sliced { owned: own, full: all.shallow_clone() }])?.wait()?;
        let all = Vec::<f32>::try_from(all.to_device(Device::Cpu).flatten(0, -1)).expect("f32 rows");
        let (rows, norms): (Vec<&[f32]>, Vec<&[f32]>) =
            all.chunks(all.len() / self.share.world_size).map(|of_rank| of_rank.split_at(of_rank.len() - norms.len())).unzip();
        let statistics = self.merged(step, &rows)?;
        let squares: f64 = replica.sharing.in_order(&norms).flat_map(|norms| norms.iter()).map(|norm| f64::from(*norm).powi(2)).sum();
        let grad_norm = squares.sqrt();
        if !grad_norm.is_finite() {
            let what = format!("the gradient's global norm is {grad_norm}; nothing was updated");
            return Err(known_to_all(Error::NotFinite { step, what }, 0, self.collective));
        }
        Ok((statistics, grad_norm))
    }

    /// All ranks' statistics in the order of the global batch, so that the sums do not depend on how many ranks shared it.
    fn merged(&self, step: u64, rows: &[&[f32]]) -> Result<Statistics> {
        let mut merged: Option<Statistics> = None;
        for (rank, micro_batch) in self.share.places() {
            let statistics = Statistics::from_row(&rows[rank][micro_batch * Statistics::WIDTH..(micro_batch + 1) * Statistics::WIDTH]);
            if self.config.train.check_loss {
                let named = |error| known_to_all(name_rank(error, rank, &statistics), rank, self.collective);
                check_loss(statistics.loss, step).map_err(named)?;
            }
            merged = Some(merged.map_or_else(|| statistics.clone(), |merged| merged.merge(&statistics)));
        }
        Ok(merged.expect("a step has micro-batches"))
    }

    fn update(
        &self,
        step: u64,
        gradients: &[Vec<Tensor>],
        grad_norm: f64,
        replica: &mut Replica<'_>,
        state: &mut OptimizerState,
    ) -> Result<()> {
        let coefficient = clip::coefficient(grad_norm, self.config.train.max_grad_norm);
        for (index, pieces) in gradients.iter().enumerate().filter(|(_, pieces)| !pieces.is_empty()) {
            if coefficient < 1.0 {
                no_grad(|| pieces.iter().for_each(|piece| drop(piece.shallow_clone().g_mul_scalar_(coefficient))));
            }
            state.update(index, &mut replica.buckets[index], pieces, &*self.config.optimizer, self.lr, step);
        }
        replica.publish()
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
