//! The loop: one step after another, and between them logging, comparing, saving and requests.

use std::sync::Arc;
use std::time::Instant;

use tch::Device;

use crate::collective::Collective;
use crate::collective::agreement::known_to_all;
use crate::config::{CheckpointSettings, RunConfig};
use crate::data::{Dataset, Loader, Steps};
use crate::error::{Error, NUMERIC, Result};
use crate::flow::{Drawn, FlowMatchingPipeline, report as flow_report};
use crate::parallel::Replica;
use crate::parallel::divergence;
use crate::phase::Phase;
use crate::pulse;
use crate::run::checkpoint::{self, Judged, Manifest, Saved, Saver};
use crate::run::folder::RunFolder;
use crate::run::optimizer_state::OptimizerState;
use crate::run::requests::{Request, Requests};
use crate::telemetry::{EventFile, MetricsFile, Telemetry, Throughput, peak_resident_bytes};
use crate::train::Ending;
use crate::train::draws::RunDraws;
use crate::train::latents;
use crate::train::metrics::{self, StepMetrics};
use crate::train::sampling::Sampler;
use crate::train::step::{Stepper, Update};
use crate::train::step_report::{self, Tally};
use crate::train::stragglers::Stragglers;
use crate::train::validation::Validator;

/// Steps over which throughput is averaged.
const THROUGHPUT_STEPS: usize = 20;

/// The state of a run between steps.
pub struct Trainer<'c> {
    pub config: &'c RunConfig,
    pub collective: &'c dyn Collective,
    pub debug: bool,
    pub folder: RunFolder,
    pub dataset: Arc<Dataset>,
    pub pipeline: FlowMatchingPipeline,
    pub device: Device,
    pub replica: Replica<'c>,
    pub optimizer_state: OptimizerState,
    /// The manifest of the next checkpoint; its step is the last one done.
    pub manifest: Manifest,
    pub metrics: MetricsFile,
    pub steps: Steps,
    pub events: EventFile,
    pub stragglers: Stragglers,
    pub saver: Saver,
    /// `None` if nothing is judged.
    pub validator: Option<Validator>,
    /// `None` if there are no prompts.
    pub sampler: Option<Sampler>,
    /// True if the step of the start has a validation that it was not given.
    pub owes_validation: bool,
    /// True if samples of the last step were left out.
    pub owes_samples: bool,
    /// The validation of the last step, if it had one.
    pub judged: Option<Judged>,
    /// True if that one is the best, whose checkpoint is kept.
    pub is_best: bool,
}

impl<'c> Trainer<'c> {
    /// Trains to the last step, or until a request to stop.
    pub fn run(&mut self, requests: &Requests, telemetry: &Telemetry) -> Result<Ending> {
        let made_up = [self.validate_at_start(requests)?, self.sample_at_start(requests)?];
        if made_up.contains(&false) && self.manifest.step > 0 {
            return self.stopped_at_start();
        }
        let draws = RunDraws::new(self.config, &self.pipeline, self.steps.clone());
        let ahead = draws.clone();
        let mut loader = Loader::start(
            Arc::clone(&self.dataset),
            self.steps.clone(),
            self.manifest.step,
            self.config.data.prefetch,
            move |place, batch| ahead.draw_ahead(place, batch),
        )?;
        let mut progress = telemetry.progress(self.config.max_steps, self.manifest.step);
        let mut throughput = Throughput::new(THROUGHPUT_STEPS);
        throughput.record(0.0);
        while self.manifest.step < self.config.max_steps {
            let began = Instant::now();
            let update = self.step(requests, &mut loader, &draws, telemetry)?;
            self.manifest.step += 1;
            self.manifest.lr =
                if update.skipped.is_none() { Some(update.lr) } else { self.manifest.lr };
            self.manifest.samples_seen += self.manifest.global_batch_size;
            throughput.record(self.manifest.global_batch_size as f64);
            let line = self.record(
                &update,
                began.elapsed().as_secs_f64(),
                throughput.per_second(),
                telemetry,
            );
            progress.advance(self.manifest.step, &line);
            let states: Vec<u8> = update.tallies.iter().map(|tally| tally.saving).collect();
            self.saver.advance(&states, self.collective)?;
            let request = step_report::request(&update.tallies);
            let (took, request) = self.validate_if_due(request, requests)?;
            throughput.leave_out(took);
            let (took, request) = self.sample_if_due(request, requests)?;
            throughput.leave_out(took);
            self.settle(request, requests)?;
            let owes = self.owes_validation || self.owes_samples;
            let is_over = self.manifest.step == self.config.max_steps && !owes;
            if request == Request::Stop && !is_over {
                self.saver.finish(self.collective)?;
                tracing::info!(
                    "stopped after step {}, as was asked; --resume latest goes on",
                    self.manifest.step
                );
                return Ok(Ending::Stopped);
            }
        }
        self.saver.finish(self.collective)?;
        if !checkpoint::is_checkpoint(
            &self.folder.path().join(checkpoint::folder_name(self.manifest.step)),
        ) {
            tracing::info!(
                "step {} has no checkpoint: checkpoint.save_last = false",
                self.manifest.step
            );
        }
        Ok(Ending::Done)
    }

    /// Ends a start that was asked to stop before what the step before it owes was made up for.
    fn stopped_at_start(&self) -> Result<Ending> {
        self.folder.forget_start(self.manifest.step, self.config.max_steps, self.collective)?;
        tracing::info!(
            "stopped as was asked, before the validation or the samples of step {} were made up for; \
             --resume latest makes them",
            self.manifest.step
        );
        Ok(Ending::Stopped)
    }

    fn step(
        &mut self,
        requests: &Requests,
        loader: &mut Loader<Option<Drawn>>,
        draws: &RunDraws,
        telemetry: &Telemetry,
    ) -> Result<Update> {
        let step = self.manifest.step + 1;
        pulse::begin_step(step);
        let stepper = Stepper {
            config: self.config,
            collective: self.collective,
            pipeline: &self.pipeline,
            draws,
            share: self.steps.share(step),
            check_stages: self.debug,
            requests,
            saver: &self.saver,
        };
        let update = stepper.step(
            step,
            loader,
            &mut self.replica,
            &mut self.optimizer_state,
            &mut self.manifest.guard,
        );
        // All ranks refuse a step for its numbers alike, and unusual latents may be the cause.
        if step == 1 && update.as_ref().err().is_none_or(|error| error.exit_code() == NUMERIC) {
            let warning = latents::warning(loader.first_latents(), self.collective)?;
            warning
                .iter()
                .filter(|_| telemetry.writes_run_files())
                .for_each(|what| tracing::warn!("step 1: {what}"));
        }
        let update = update.map_err(|error| self.refused(error))?;
        self.count_bad_samples(&update.tallies)?;
        Ok(update)
    }

    /// Stops the run on every rank alike if an epoch has too many bad samples.
    fn count_bad_samples(&mut self, tallies: &[Tally]) -> Result<()> {
        let met = tallies.iter().map(|tally| tally.bad_samples as u64).sum();
        let epoch = self.steps.epoch_of(self.manifest.step + 1);
        let samples = self.steps.order().samples_per_epoch();
        let count = self.manifest.guard.bad_samples(epoch, met);
        let allowed = (self.config.data.bad_share * samples as f64).ceil() as u64;
        if count <= allowed {
            return Ok(());
        }
        let what = format!(
            "{count} samples of epoch {epoch} are not finite; data.bad_share allows {allowed} of {samples}"
        );
        Err(known_to_all(Error::data(self.dataset.path(), what), 0, self.collective))
    }

    /// Adds the last checkpoint to the error of a step that all ranks refused alike, after a save
    /// in flight has finished.
    fn refused(&mut self, error: Error) -> Error {
        if error.exit_code() != NUMERIC {
            return error;
        }
        if let Err(trouble) = self.saver.finish(self.collective) {
            tracing::warn!("the save under way gave no checkpoint: {trouble}");
        }
        match (error, checkpoint::list(self.folder.path())) {
            (Error::NotFinite { step, what }, Ok(list)) => {
                let last = list
                    .last()
                    .map_or("none was saved".into(), |(_, path)| path.display().to_string());
                Error::NotFinite { step, what: format!("{what}; last checkpoint: {last}") }
            }
            (error, _) => error,
        }
    }

    /// Compares parameters and saves after a step, if it is due or requested.
    fn settle(&mut self, request: Request, requests: &Requests) -> Result<()> {
        let saves = self.saves_now() || self.is_best || request != Request::Nothing;
        if saves || self.manifest.step.is_multiple_of(self.config.watchdog.compare_every_n_steps) {
            pulse::enter(Phase::Compare);
            divergence::check(&self.replica, self.collective.rank())?;
        }
        if request != Request::Nothing {
            requests.done(request);
        }
        if saves { self.save() } else { Ok(()) }
    }

    /// Writes the logs that are due; returns the text beside the progress bar.
    fn record(
        &mut self,
        update: &Update,
        seconds: f64,
        samples_per_second: Option<f64>,
        telemetry: &Telemetry,
    ) -> String {
        let metrics = StepMetrics::new(
            update,
            metrics::Progress {
                step: self.manifest.step,
                epoch: self.steps.epoch_of(self.manifest.step),
                samples_seen: self.manifest.samples_seen,
                step_seconds: seconds,
                samples_per_second,
                peak_memory_bytes: peak_resident_bytes(),
            },
        );
        self.metrics.append(&metrics);
        self.events.append(self.manifest.step, || metrics.scalars());
        let stragglers =
            self.stragglers.take(&update.tallies, self.config.watchdog.straggler_ratio);
        let skipped = update
            .skipped
            .iter()
            .map(|why| format!("step {} was skipped: {why}", self.manifest.step));
        let bad: usize = update.tallies.iter().map(|tally| tally.bad_samples).sum();
        let bad = (bad > 0).then(|| {
            format!("step {}: {bad} samples are not finite and were skipped", self.manifest.step)
        });
        let warned =
            update.warning.iter().map(|what| format!("step {}: {what}", self.manifest.step));
        if telemetry.writes_run_files() {
            skipped
                .chain(warned)
                .chain(bad)
                .chain(stragglers)
                .for_each(|line| tracing::warn!("{line}"));
        }
        let flow = self.pipeline.settings();
        // The first step is due as well: the reference, which counts from 0, logs it.
        let due =
            |interval: u64| self.manifest.step == 1 || self.manifest.step.is_multiple_of(interval);
        if self.debug || due(flow.log_interval) {
            for line in flow_report::detailed(metrics.facts(), &update.statistics, flow).lines() {
                tracing::info!("{line}");
            }
        } else if due(flow.summary_log_interval) {
            let line = flow_report::summary(metrics.facts(), &update.statistics);
            tracing::info!("{line} | {}", metrics.pace());
        }
        format!("loss {:.4}", update.statistics.loss)
    }

    fn saves_now(&self) -> bool {
        let CheckpointSettings { every_n_steps, every_n_epochs, save_last, .. } =
            self.config.checkpoint;
        let step = self.manifest.step;
        let epoch_is_due = |epochs: u64| every_n_epochs.is_some_and(|n| epochs.is_multiple_of(n));
        step.is_multiple_of(every_n_steps)
            || (save_last && step == self.config.max_steps)
            || self.steps.epochs_ended_by(step).is_some_and(epoch_is_due)
    }

    fn save(&mut self) -> Result<()> {
        self.metrics.sync();
        let saved = Saved {
            manifest: &self.manifest,
            judged: self.judged.as_ref(),
            replica: &self.replica,
            optimizer: &*self.config.optimizer.rule,
            state: &self.optimizer_state,
        };
        self.saver.begin(&saved, self.collective)
    }
}
