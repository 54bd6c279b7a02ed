//! Assembles a run: data, model, optimizer, and the checkpoint to resume from.

use std::sync::Arc;

use tch::Device;

use crate::assembly::validation::ValidationSet;
use crate::assembly::{
    Begun, build_pipeline, dataset, devices, fresh_replica, replica_for_checkpoint, steps,
};
use crate::collective::Collective;
use crate::collective::agreement::{agreed, on_rank_zero};
use crate::config::RunConfig;
use crate::data::Steps;
use crate::error::Result;
use crate::failure;
use crate::flow::Note;
use crate::libtorch;
use crate::ops;
use crate::parallel::divergence;
use crate::parallel::{Sharding, Sharing};
use crate::phase::Phase;
use crate::plan::{check_data, check_validation, judged_text, memory_forecast, shares};
use crate::run::changes;
use crate::run::checkpoint::{self, AllowedChanges, Manifest, Saver};
use crate::run::folder::RunFolder;
use crate::run::optimizer_state::OptimizerState;
use crate::settings::Choice;
use crate::telemetry::tensorboard::{EventFile, EventValue};
use crate::telemetry::{MetricsFile, Telemetry};
use crate::train::TrainOptions;
use crate::train::inject;
use crate::train::sampling::Sampler;
use crate::train::stragglers::Stragglers;
use crate::train::trainer::Trainer;
use crate::train::validation::{self, Validator};

impl<'c> Trainer<'c> {
    /// Returns a trainer at the first step, or after the checkpoint that the run folder resumes
    /// from.
    ///
    /// # Errors
    /// Errors of the data, the model, the checkpoint and the collectives.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn new(
        config: &'c RunConfig,
        options: &TrainOptions,
        collective: &'c dyn Collective,
        device: Device,
        telemetry: &Telemetry,
        folder: RunFolder,
    ) -> Result<Self> {
        let dataset = Arc::new(dataset(config)?);
        let steps = steps(config, &dataset, collective)?;
        let mut notes = check_data(config, &dataset)?;
        let set = ValidationSet::of(config, &dataset)?;
        if let Some(set) = &set {
            notes.extend(check_validation(config, set, &dataset)?);
        }
        failure::set_forecast(memory_forecast(config, &dataset, collective.world_size())?);
        let sampler = Sampler::new(config, &dataset, device, folder.path(), collective)?;
        tune_allocator(config);
        let Begun { replica, base } = begun(config, &folder, &steps, collective, device)?;
        let fresh = OptimizerState::fresh(&replica, config, devices(config, device));
        let pipeline = build_pipeline(config, device);
        let criterion = set.as_ref().map(|set| set.criterion.clone());
        let mut trainer = Trainer {
            config,
            collective,
            debug: options.debug,
            validator: set.map(|set| Validator::new(config, set, &pipeline)),
            sampler,
            pipeline,
            device,
            optimizer_state: agreed(fresh, collective)?,
            replica,
            manifest: Manifest::new(
                config,
                steps.share(1).global_batch() as u64,
                dataset.fingerprint(),
            )
            .with_small_groups(steps.order().on_small_group())
            .on_base(base),
            dataset,
            metrics: MetricsFile::silent(),
            steps,
            events: EventFile::silent(),
            stragglers: Stragglers::default(),
            saver: Saver::new(folder.path().into(), config.checkpoint.clone())
                .exporting(config)
                .choosing_by(criterion),
            folder,
            owes_validation: false,
            owes_samples: false,
            judged: None,
            is_best: false,
        };
        if let Err(error) = trainer.go_on(options.allowed, telemetry) {
            trainer.replica.abandon_peers();
            return Err(error);
        }
        trainer.announce();
        if telemetry.writes_run_files() {
            notes.iter().for_each(tell);
            trainer.steps.order().small_groups().iter().for_each(|what| tracing::warn!("{what}"));
            jump_of_lr(config, &trainer.manifest).iter().for_each(|what| tracing::warn!("{what}"));
        }
        Ok(trainer)
    }

    /// Takes up the state that the run folder holds, and opens its files.
    fn go_on(&mut self, allowed: AllowedChanges, telemetry: &Telemetry) -> Result<()> {
        self.resume(allowed)?;
        inject::parameters(Phase::Open, &mut self.replica);
        divergence::check(&self.replica, self.collective.rank())?;
        self.folder.keep_config(self.config, self.collective)?;
        self.owes_validation = self.owes_validation()?;
        let redone = self.owes_validation.then_some(validation::LOSS);
        self.metrics = telemetry.metrics_after(self.manifest.step, redone)?;
        self.events = telemetry.events_after(self.manifest.step);
        self.events.append(self.manifest.step, || {
            let listing = format!("```toml\n{}```\n", self.config.to_toml());
            vec![("configuration".into(), EventValue::Text(listing))]
        });
        Ok(())
    }

    /// Loads the checkpoint that the run folder resumes from, if any. One that was copied into a
    /// branch and is not this run's is taken out again: the branch would look like a run.
    fn resume(&mut self, allowed: AllowedChanges) -> Result<()> {
        let Some(path) = self.folder.resumed_from() else { return Ok(()) };
        let loaded = checkpoint::load(
            path,
            self.config,
            &self.manifest,
            allowed,
            &mut self.replica,
            &*self.config.optimizer.rule,
            &mut self.optimizer_state,
        );
        let loaded = agreed(loaded, self.collective);
        if loaded.is_err() && self.folder.branches_off().is_some() {
            let withdraw = || checkpoint::withdraw(path).map(|()| String::new());
            on_rank_zero(self.collective, withdraw)?;
        }
        self.manifest = loaded?;
        let Manifest { step, samples_seen, .. } = self.manifest;
        self.steps = self.steps.clone().going_on(step, samples_seen);
        self.folder.note_start(step, self.config.max_steps, self.collective)?;
        self.saver.make_up(path, self.collective)?;
        match self.folder.branches_off() {
            None => tracing::info!("resumed from {} at step {step}", path.display()),
            Some(other) => tracing::info!("branches off {} at step {step}", other.display()),
        }
        Ok(())
    }

    fn announce(&self) {
        let (parameters, stages) = (self.replica.num_parameters(), self.replica.stages.len());
        tracing::info!(
            "model {parameters} parameters in {stages} stages, {:?}",
            self.config.model.dtype
        );
        if self.replica.has_frozen() {
            let trained = self.replica.num_trained();
            let frozen = parameters - trained;
            let base = self.manifest.base.as_ref().map(ToString::to_string).unwrap_or_default();
            let form = self.config.model.frozen_dtype.map(Choice::word);
            let held = form.map(|form| format!(", held in {form}")).unwrap_or_default();
            tracing::info!("trained: {trained} of them; {frozen} are frozen{held}, {base}");
        }
        if let Some(decay) = self.config.ema.decay {
            let (trained, kind) = (self.replica.num_trained(), self.config.ema.dtype.word());
            tracing::info!("ema: averages of {trained} parameters in {kind}, decay {decay}");
        }
        let order = self.steps.order();
        tracing::info!(
            "data {}: {} samples, resolution groups: {}, {} steps an epoch",
            self.dataset.name(),
            self.dataset.num_samples(),
            self.dataset.groups().len(),
            order.batches_per_epoch(),
        );
        for (path, share) in shares(&self.dataset, order) {
            tracing::info!("data {path}: {share}");
        }
        if let Some(validator) = &self.validator {
            tracing::info!("validation: {}", judged_text(self.config, validator.set()));
        }
        self.announce_batches();
        tracing::info!("{}", ops::way(self.device));
        self.announce_sharing();
    }

    fn announce_batches(&self) {
        let shares = self.steps.shares();
        let (world_size, threads) = (shares[0].world_size, self.config.parallel.num_threads);
        let sizes = || shares.iter().map(|share| share.micro_batch_size);
        match shares {
            [share] => tracing::info!(
                "global batch {} = {} samples x {world_size} ranks x {} micro-batches; {threads} threads a rank",
                share.global_batch(),
                share.micro_batch_size,
                share.micro_batches,
            ),
            _ => tracing::info!(
                "global batch {} over {world_size} ranks, in micro-batches of {} to {} samples, up to {} tokens; {threads} threads a rank",
                shares[0].global_batch(),
                sizes().min().unwrap_or_default(),
                sizes().max().unwrap_or_default(),
                self.config.data.micro_batch_tokens_per_gpu,
            ),
        }
    }

    fn announce_sharing(&self) {
        let (parallel, cut) = (&self.config.parallel, self.replica.sharing.cut());
        if parallel.sharding != Sharding::None {
            let (word, shards, copies) =
                (parallel.sharding.word(), cut.num_shards, cut.num_replicas);
            match shards {
                1 => tracing::warn!(
                    "sharding = \"{word}\" has no effect: no other rank to share with"
                ),
                _ => tracing::info!("sharding {word}: {shards} shards, {copies} of each"),
            }
        }
        if parallel.deterministic {
            tracing::info!("deterministic: one order of sums for any number of ranks");
        }
    }
}

/// Sets libtorch's allocator, which is the whole process's.
fn tune_allocator(config: &RunConfig) {
    // Sharded gradients are used when memory is short, and freed blocks that malloc keeps fit no
    // other use: they took 13 % more memory in a measurement.
    if !config.parallel.sharding.scatters_each_micro_batch() {
        libtorch::keep_freed_memory();
    }
}

/// Returns the initial model, or what a checkpoint is loaded into next.
fn begun<'c>(
    config: &RunConfig,
    folder: &RunFolder,
    steps: &Steps,
    collective: &'c dyn Collective,
    device: Device,
) -> Result<Begun<'c>> {
    let parallel = &config.parallel;
    let sharing = Sharing::new(
        collective,
        parallel.sharding,
        parallel.sharding_group,
        // With `deterministic`, all steps have as many micro-batches.
        parallel.grains(steps.share(1).micro_batches),
    )?;
    if folder.resumed_from().is_some() {
        return replica_for_checkpoint(config, device, sharing, collective);
    }
    let begun = fresh_replica(config, device, sharing, collective)?;
    if let Some(weights) = config.model.pretrained() {
        tracing::info!("weights from {}", weights.display());
    }
    Ok(begun)
}

/// Writes a note to the log.
pub(super) fn tell(note: &Note) {
    match note {
        Note::Warning(text) => tracing::warn!("{text}"),
        Note::Information(text) => tracing::info!("{text}"),
    }
}

/// Returns a warning if the learning rate does not continue the schedule of the checkpoint's run.
fn jump_of_lr(config: &RunConfig, manifest: &Manifest) -> Option<String> {
    changes::jump_of_lr(
        config,
        manifest.lr?,
        manifest.step,
        manifest.guard.update_number(manifest.step),
    )
}
