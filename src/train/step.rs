//! One optimizer step from top to bottom: micro-batches, reduce, check, clip, update.

use tch::Tensor;

use crate::collective::agreement::known_to_all;
use crate::collective::{Collective, Spent};
use crate::config::{OnLossSpike, OnNonFinite, RunConfig, TrainSettings};
use crate::data::{Batch, Loaded, Loader, Place, Share};
use crate::error::{Error, Result};
use crate::fault;
use crate::flow::{
    Drawn, FlowMatchingPipeline, Statistics, StepOptions, StepOutput, TaskType, is_sound,
};
use crate::nn::DROPOUT_KEYS;
use crate::optim::clip;
use crate::parallel::{Joining, ParallelSettings, Reducer, Replica};
use crate::phase::Phase;
use crate::pulse;
use crate::run::checkpoint::Saver;
use crate::run::guard::{BUDGET_STEPS, Guard};
use crate::run::optimizer_state::{Change, OptimizerState};
use crate::run::requests::Requests;
use crate::telemetry::Stopwatch;
use crate::train::diagnose::{Finding, diagnose};
use crate::train::draws::RunDraws;
use crate::train::inject;
use crate::train::step_report::{self, OWN_PHASES, Own, Tally};

/// A configuration without micro-batches is refused earlier.
const MICRO_BATCHES: &str = "a step has micro-batches";

/// The inputs of a step besides the model and its state.
pub struct Stepper<'a> {
    pub config: &'a RunConfig,
    pub collective: &'a dyn Collective,
    pub pipeline: &'a FlowMatchingPipeline,
    pub draws: &'a RunDraws,
    /// This rank's share of the step.
    pub share: Share,
    /// True if every stage is searched for non-finite values.
    pub check_stages: bool,
    /// This rank's requests, which are sent to the others with the statistics.
    pub requests: &'a Requests,
    /// The saver, whose progress on this rank is sent to the others with the statistics.
    pub saver: &'a Saver,
}

/// The result of a step.
#[derive(Debug)]
pub struct Update {
    /// Statistics over all ranks and micro-batches.
    pub statistics: Statistics,
    /// Gradient norm of the mean loss over the elements that the masks keep, before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    /// Reason why the parameters were left unchanged; `None` if they were updated.
    pub skipped: Option<String>,
    /// Warning to log.
    pub warning: Option<String>,
    /// Reports of all ranks, in rank order.
    pub tallies: Vec<Tally>,
    pub sampling_method: &'static str,
    pub shift: f64,
    pub task_type: TaskType,
    pub data_type: &'static str,
    /// Seconds of each phase on this rank.
    pub phases: Vec<(&'static str, f64)>,
    /// Seconds of collectives on this rank, in any phase.
    pub spent: Spent,
}

/// The outcome of a step's micro-batches: forward and backward are done and the gradients are
/// reduced.
struct Passed {
    /// This rank's shard of the sum of all gradients, by stage and piece.
    gradients: Vec<Vec<Tensor>>,
    /// One row of statistics for each micro-batch.
    rows: Vec<Tensor>,
    /// Kept in case the step must be repeated to find a fault.
    batches: Vec<Batch>,
    sampling_method: &'static str,
    shift: f64,
    task_type: TaskType,
}

/// Numbers that are equal on all ranks, known before the parameters are updated.
struct Seen {
    statistics: Statistics,
    /// Norm of the gradient of the mean loss over the elements that the masks keep.
    grad_norm: f64,
    tallies: Vec<Tally>,
}

/// Reason to skip a step, or to warn about it.
enum Objection {
    None,
    Warn(String),
    Skip(String),
}

impl Stepper<'_> {
    /// Runs optimizer step `step`, counted from 1.
    ///
    /// # Errors
    /// [`Error::NotFinite`] on every rank alike, before anything is updated; errors of the loader
    /// and the collectives.
    pub fn step(
        &self,
        step: u64,
        loader: &mut Loader<Option<Drawn>>,
        replica: &mut Replica<'_>,
        state: &mut OptimizerState,
        guard: &mut Guard,
    ) -> Result<Update> {
        let mut watch = Stopwatch::start();
        // Discards seconds spent since the last step, e.g. on a checkpoint: they are not this
        // step's.
        self.spent(replica);
        let passed = self.micro_batches(step, loader, replica, &mut watch)?;
        let seen = self.exchange(&passed, replica, &watch)?;
        watch.lap("reduce");
        let update_number = guard.update_number(step);
        let lr = self.config.optimizer.rule.lr()
            * self.config.lr_scheduler.factor(update_number, self.config.max_steps);
        let (mut skipped, mut warning) = (None, None);
        match self.objection(step, &seen, &passed.batches, replica, guard)? {
            Objection::Skip(why) => skipped = Some(self.skip(step, why, guard)?),
            objection => {
                pulse::enter(Phase::Optimizer);
                self.update(update_number, lr, &passed.gradients, &seen, replica, state)?;
                guard.applied(seen.statistics.loss);
                warning = if let Objection::Warn(why) = objection { Some(why) } else { None };
            }
        }
        watch.lap("optimizer");
        let Seen { statistics, grad_norm, tallies } = seen;
        Ok(Update {
            statistics,
            grad_norm,
            lr,
            skipped,
            warning,
            tallies,
            sampling_method: passed.sampling_method,
            shift: passed.shift,
            task_type: passed.task_type,
            data_type: passed.batches.last().expect(MICRO_BATCHES).data_type.word(),
            phases: watch.take(),
            spent: self.spent(replica),
        })
    }

    /// Runs forward and backward of each micro-batch; a stage's gradients are reduced while the
    /// stage before it computes.
    fn micro_batches(
        &self,
        step: u64,
        loader: &mut Loader<Option<Drawn>>,
        replica: &Replica<'_>,
        watch: &mut Stopwatch,
    ) -> Result<Passed> {
        let summation = self.config.parallel.summation();
        let (sharing, buckets) = (&replica.sharing, &replica.buckets);
        let mut reducer = Reducer::new(sharing, buckets, self.joining(), summation);
        let (mut rows, mut batches, mut last) = (Vec::new(), Vec::new(), None);
        for micro_batch in 0..self.share.micro_batches {
            pulse::enter(Phase::Data);
            let Loaded { batch, ahead } = loader.next_batch()?;
            watch.lap("data");
            pulse::enter(Phase::Draw);
            let place = Place { step, micro_batch };
            let drawn = match ahead.wait()? {
                Some(drawn) => drawn,
                None => self.draws.draw(place, &batch)?,
            };
            let drawn = drawn.on(self.pipeline.device());
            watch.lap("draw");
            let is_last = micro_batch + 1 == self.share.micro_batches;
            let add = &mut |stage, gradients| reducer.add(stage, gradients, is_last);
            let output = self.forward_backward(step, &batch, drawn, replica, add, watch)?;
            rows.push(output.statistics.expect("metrics are collected each step"));
            last = Some((output.sampling_method, output.shift, output.task_type));
            batches.push(batch);
        }
        pulse::enter(Phase::Reduce);
        inject::collectives(self.collective)?;
        let (sampling_method, shift, task_type) = last.expect(MICRO_BATCHES);
        let gradients = reducer.finish()?;
        Ok(Passed { gradients, rows, batches, sampling_method, shift, task_type })
    }

    /// Runs the step's one small collective.
    fn exchange(&self, passed: &Passed, replica: &Replica<'_>, watch: &Stopwatch) -> Result<Seen> {
        let grains = self.config.parallel.grains(self.share.micro_batches);
        let issued = self.collective.issued();
        let own = Own {
            statistics: &passed.rows,
            norms: &replica.norms_of_grains(&passed.gradients, grains),
            request: self.requests.heard(),
            seconds: OWN_PHASES.map(|phase| watch.seconds(phase)),
            saving: self.saver.progress(),
            bad_samples: passed.batches.iter().map(|batch| batch.bad_samples).sum(),
            issued,
        };
        let tallies = step_report::exchange(&own, self.collective)?;
        step_report::check_in_step(&tallies, &issued, self.collective)?;
        let statistics = self.merged(&tallies);
        let norms: Vec<&[f32]> = tallies.iter().map(|tally| &tally.norms[..]).collect();
        let grad_norm = statistics.gradient_scale() * replica.grad_norm(&norms);
        Ok(Seen { statistics, grad_norm, tallies })
    }

    /// The kinds of this step's gradients.
    fn joining(&self) -> Joining {
        let ParallelSettings { sharding, reduce_dtype, .. } = self.config.parallel;
        let Share { world_size, micro_batches, .. } = self.share;
        Joining::new(world_size, sharding, reduce_dtype, micro_batches)
    }

    fn spent(&self, replica: &Replica<'_>) -> Spent {
        self.collective.spent() + replica.sharing.spent()
    }

    /// Computes a micro-batch's loss, and passes its gradients to `on_gradient(stage, pieces)`.
    ///
    /// # Errors
    /// Errors of the pipeline, a collective or `on_gradient`.
    pub fn forward_backward(
        &self,
        step: u64,
        batch: &Batch,
        drawn: Drawn,
        replica: &Replica<'_>,
        on_gradient: &mut dyn FnMut(usize, Vec<Tensor>) -> Result<()>,
        watch: &mut Stopwatch,
    ) -> Result<StepOutput> {
        pulse::enter(Phase::Forward);
        fault::error(Phase::Forward)?;
        let parallel = &self.config.parallel;
        let tape = replica.tape(parallel.recompute).offloading(parallel.offload.activations);
        let tape = tape.joining(self.joining());
        let mut tape = tape.checking_finite(self.check_stages.then_some(step));
        // The loss is checked later, for all ranks at once.
        let options = StepOptions { global_step: step, collect_metrics: true, check_loss: false };
        let keys = self.draws.dropout_keys(step, batch);
        let keys = keys.map(|keys| keys.to_device(self.pipeline.device()));
        let output = self.pipeline.step_after_draws(
            |inputs| {
                let inputs = inputs.with_optional(DROPOUT_KEYS, keys);
                Ok(inject::outputs(tape.forward(inputs)?))
            },
            batch,
            drawn,
            options,
        )?;
        watch.lap("forward");
        pulse::enter(Phase::Backward);
        // Divided by the number of all ranks' micro-batches, so that gradients can be summed. The
        // total weight that the masks keep is known only after the last micro-batch, and divides
        // the sum.
        let share =
            &output.loss.objective / (self.share.micro_batches * self.share.world_size) as f64;
        tape.backward(&share, |stage, gradients| {
            on_gradient(stage, inject::gradients(stage, gradients))
        })?;
        watch.lap("backward");
        Ok(output)
    }

    /// Merges all ranks' statistics in the order of the global batch, so that the sums do not
    /// depend on the number of ranks.
    fn merged(&self, tallies: &[Tally]) -> Statistics {
        let in_order = self
            .share
            .places()
            .map(|(rank, micro_batch)| tallies[rank].statistics[micro_batch].clone());
        in_order.reduce(|merged, statistics| merged.merge(&statistics)).expect(MICRO_BATCHES)
    }

    /// Decides if the step is applied, skipped or refused.
    fn objection(
        &self,
        step: u64,
        seen: &Seen,
        batches: &[Batch],
        replica: &Replica<'_>,
        guard: &Guard,
    ) -> Result<Objection> {
        let Seen { statistics, grad_norm, tallies } = seen;
        if statistics.kept == 0.0 {
            let samples = self.share.global_batch();
            return Ok(Objection::Skip(format!(
                "the loss masks keep nothing of the global batch's {samples} samples"
            )));
        }
        let TrainSettings { check_loss, on_non_finite, on_loss_spike, loss_spike_height, .. } =
            self.config.train;
        let sound = tallies
            .iter()
            .flat_map(|tally| &tally.statistics)
            .all(|statistics| is_sound(statistics.loss));
        if !grad_norm.is_finite() || (check_loss && !sound) {
            let Finding { rank, what } = diagnose(self, step, batches, replica)?;
            return match on_non_finite {
                OnNonFinite::Stop => Err(self.refused(step, rank, &what)),
                OnNonFinite::Skip => Ok(Objection::Skip(what)),
            };
        }
        let Some(height) =
            guard.height(statistics.loss).filter(|height| *height > loss_spike_height)
        else {
            return Ok(Objection::None);
        };
        let what = format!(
            "the loss {:.4} stands {height:.1} deviations above the median {:.4}",
            statistics.loss,
            guard.median()
        );
        match on_loss_spike {
            OnLossSpike::Ignore => Ok(Objection::None),
            OnLossSpike::Warn => Ok(Objection::Warn(what)),
            OnLossSpike::Skip => Ok(Objection::Skip(what)),
            OnLossSpike::Stop => Err(self.refused(step, 0, &what)),
        }
    }

    fn refused(&self, step: u64, speaker: usize, what: &str) -> Error {
        known_to_all(
            Error::NotFinite { step, what: format!("{what}; nothing was updated") },
            speaker,
            self.collective,
        )
    }

    /// Skips a step while the budget lasts; returns the message about it.
    fn skip(&self, step: u64, why: String, guard: &mut Guard) -> Result<String> {
        let (skipped, budget) = (guard.skip(step), self.config.train.skip_budget);
        if skipped > budget {
            let what = format!(
                "{why}; {skipped} of the last {BUDGET_STEPS} steps would be skipped, train.skip_budget is {budget}"
            );
            return Err(self.refused(step, 0, &what));
        }
        Ok(format!("{why}; {skipped} of the last {BUDGET_STEPS} steps skipped, {budget} may be"))
    }

    fn update(
        &self,
        update_number: u64,
        lr: f64,
        gradients: &[Vec<Tensor>],
        seen: &Seen,
        replica: &mut Replica<'_>,
        state: &mut OptimizerState,
    ) -> Result<()> {
        let clipped = clip::coefficient(seen.grad_norm, self.config.train.max_grad_norm);
        let gradient_factor = seen.statistics.gradient_scale() * clipped;
        let change = Change { gradient_factor, lr, step: update_number };
        for (index, pieces) in gradients.iter().enumerate() {
            state.update(index, &mut replica.buckets[index], pieces, change);
        }
        inject::parameters(Phase::Optimizer, replica);
        replica.publish()
    }
}
