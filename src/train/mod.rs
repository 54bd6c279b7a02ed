//! The only room where science and machinery meet: the loop, and when it logs, saves and samples.

mod agreement;
mod check;
mod checkpoint;
mod conditions;
mod diagnose;
mod divergence;
mod export;
mod generate;
mod guard;
mod metrics;
mod place;
mod report;
mod requests;
mod run_folder;
mod single_step;
mod spoil;
mod start;
mod state;
mod step;
mod stragglers;
mod tally;
mod weights;

pub use check::{CheckRequest, check};
pub use export::{ExportRequest, export};
pub use generate::{SampleRequest, sample};
pub use requests::StopFlag;
pub use run_folder::Resume;
pub use single_step::{StepRequest, dump_step};
pub use start::{begin, share_config};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tch::Device;

use crate::collective::Collective;
use crate::config::{CheckpointSettings, RunConfig};
use crate::data::{Dataset, Loader, Order, Share};
use crate::error::{Error, Result};
use crate::failure;
use crate::fault;
use crate::flow::{FlowMatchingPipeline, report as flow_report};
use crate::model::SampleShapes;
use crate::parallel::{Replica, Sharding, Sharing};
use crate::pulse::{self, Phase};
use crate::rng::{Key, Purpose};
use crate::settings::Choice;
use crate::telemetry::{self, MetricsFile, Telemetry, Throughput, peak_resident_bytes};
use agreement::{agree, known_to_all};
use checkpoint::{Manifest, Saved};
use metrics::StepMetrics;
use place::Place;
use requests::{Request, Requests};
use run_folder::RunFolder;
use state::OptimizerState;
use step::{Stepper, Update};
use stragglers::Stragglers;
use tally::Tally;

/// Steps over which throughput is averaged.
const THROUGHPUT_STEPS: usize = 20;

/// How a run begins and what it looks at, from the command line.
#[derive(Clone, Debug, Default)]
pub struct TrainOptions {
    pub resume: Resume,
    /// One process, detailed logs each step, every stage searched for non-finite values.
    pub debug: bool,
    /// Raised by signals.
    pub stop: StopFlag,
    /// When to save and stop by itself.
    pub stop_at: Option<Instant>,
    /// What starting has to warn of.
    pub warning: Option<String>,
}

/// How a run left off without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// At its last step.
    Done,
    /// Before, because it was asked to, with a checkpoint to go on from.
    Stopped,
}

/// Trains from the first step, or the resumed one, to `max_steps` or a request to stop; returns the run folder. Every rank
/// calls it.
///
/// # Errors
/// Whatever ends the run; the caller tells the other ranks by ending the world.
pub fn train(config: &RunConfig, options: &TrainOptions, world: &dyn Collective) -> Result<(PathBuf, Ending)> {
    pulse::enter(Phase::Open);
    if let (Some(warning), true) = (&options.warning, config.parallel.deterministic) {
        return Err(known_to_all(Error::environment(format!("{warning}: parallel.deterministic needs one kind")), 0, world));
    }
    let place = Place::take(config, world)?;
    let outcome = train_at(&place, config, options, place.collective(world));
    if outcome.is_err() {
        place.abandon();
    }
    outcome
}

fn train_at(place: &Place, config: &RunConfig, options: &TrainOptions, collective: &dyn Collective) -> Result<(PathBuf, Ending)> {
    let folder = RunFolder::open(&config.output_dir, &options.resume, collective)?;
    let telemetry = telemetry::start(&config.log, collective.rank(), collective.world_size(), folder.path());
    telemetry.cover_all_threads();
    failure::keep_in(folder.path());
    if telemetry.speaks_for_the_run() {
        let fault = fault::ordered().map(|order| format!("debug.inject_fault = \"{order}\": this run breaks on purpose"));
        folder.warnings().iter().chain(&options.warning).chain(&fault).for_each(|warning| tracing::warn!("{warning}"));
    }
    let listens = telemetry.speaks_for_the_run().then(|| folder.path().to_path_buf());
    let requests = Requests::new(options.stop.clone(), options.stop_at, listens);
    let mut trainer = Trainer::new(config, options, collective, place.device, &telemetry, folder)?;
    let ending = trainer.run(&requests, &telemetry)?;
    if ending == Ending::Done {
        pulse::enter(Phase::Report);
        report::write(config, &trainer.folder, &trainer.replica, &trainer.dataset, trainer.device, collective)?;
    }
    tracing::info!("run folder {}", trainer.folder.path().display());
    Ok((trainer.folder.path().into(), ending))
}

/// A run between its first step and its last.
struct Trainer<'c> {
    config: &'c RunConfig,
    collective: &'c dyn Collective,
    debug: bool,
    folder: RunFolder,
    dataset: Arc<Dataset>,
    order: Order,
    pipeline: FlowMatchingPipeline,
    device: Device,
    replica: Replica<'c>,
    optimizer_state: OptimizerState,
    /// What the next checkpoint says of the run; its step is the last one done.
    manifest: Manifest,
    metrics: MetricsFile,
    share: Share,
    stragglers: Stragglers,
}

impl<'c> Trainer<'c> {
    fn new(
        config: &'c RunConfig,
        options: &TrainOptions,
        collective: &'c dyn Collective,
        device: Device,
        telemetry: &Telemetry,
        folder: RunFolder,
    ) -> Result<Self> {
        let share = share_of(config, collective)?;
        let global_batch = share.global_batch();
        let dataset = Arc::new(Dataset::named(&config.data.path)?.on_bad(config.data.on_bad));
        check_data(config, &dataset)?;
        let order = Order::new(dataset.groups(), global_batch, config.seed)?;
        tch::set_num_threads(config.parallel.num_threads);
        let parallel = &config.parallel;
        let sharing = Sharing::new(collective, parallel.sharding, parallel.sharding_group, parallel.grains(share.micro_batches))?;
        let mut replica = match folder.resumed_from() {
            Some(_) => empty_replica(config, device, sharing)?,
            None => fresh_replica(config, device, sharing, collective)?,
        };
        if let (None, Some(weights)) = (folder.resumed_from(), config.model.pretrained()) {
            tracing::info!("weights from {}", weights.display());
        }
        let mut optimizer_state = OptimizerState::fresh(&replica, &*config.optimizer, home(config, device));
        let mut manifest = Manifest::new(config.seed, global_batch as u64, dataset.fingerprint());
        if let Some(path) = folder.resumed_from() {
            let loaded = checkpoint::load(path, &manifest, &mut replica, &*config.optimizer, &mut optimizer_state);
            let outcome = loaded.map(|loaded| manifest = loaded);
            agree(outcome.map(|()| String::new()), collective)?;
            tracing::info!("resumed from {} at step {}", path.display(), manifest.step);
        }
        spoil::parameters(Phase::Open, &mut replica);
        divergence::check(&replica)?;
        folder.keep_config(config, collective)?;
        let metrics = telemetry.metrics_after(manifest.step)?;
        let pipeline = build_pipeline(config, device);
        let trainer = Trainer {
            config,
            collective,
            debug: options.debug,
            folder,
            dataset,
            order,
            pipeline,
            device,
            replica,
            optimizer_state,
            manifest,
            metrics,
            share,
            stragglers: Stragglers::default(),
        };
        trainer.announce(global_batch);
        Ok(trainer)
    }

    fn announce(&self, global_batch: usize) {
        let (parameters, stages) = (self.replica.num_parameters(), self.replica.stages.len());
        tracing::info!("model {parameters} parameters in {stages} stages, {:?}", self.config.model.dtype);
        tracing::info!(
            "data {}: {} samples, resolution groups: {}, {} steps an epoch",
            self.dataset.manifest().name,
            self.dataset.num_samples(),
            self.dataset.groups().len(),
            self.order.batches_per_epoch(),
        );
        tracing::info!(
            "global batch {global_batch} = {} samples x {} ranks x {} micro-batches; {} threads a rank",
            self.config.data.micro_batch_size_per_gpu,
            self.share.world_size,
            self.share.micro_batches,
            self.config.parallel.num_threads,
        );
        self.announce_sharing();
    }

    fn announce_sharing(&self) {
        let (parallel, cut) = (&self.config.parallel, self.replica.sharing.cut());
        if parallel.sharding != Sharding::None {
            let (word, shards, copies) = (parallel.sharding.word(), cut.num_shards, cut.num_replicas);
            match shards {
                1 => tracing::warn!("sharding = \"{word}\" has no effect: no other rank to share with"),
                _ => tracing::info!("sharding {word}: {shards} shards, {copies} of each"),
            }
        }
        if parallel.deterministic {
            tracing::info!("deterministic: one order of sums for any number of ranks");
        }
    }

    fn run(&mut self, requests: &Requests, telemetry: &Telemetry) -> Result<Ending> {
        let (dataset, order) = (Arc::clone(&self.dataset), self.order.clone());
        let mut loader = Loader::start(dataset, order, self.share, self.manifest.step, self.config.data.prefetch)?;
        let mut progress = telemetry.progress(self.config.max_steps, self.manifest.step);
        let mut throughput = Throughput::new(THROUGHPUT_STEPS);
        throughput.record(0.0);
        while self.manifest.step < self.config.max_steps {
            let began = Instant::now();
            let update = self.step(requests, &mut loader)?;
            self.manifest.step += 1;
            self.manifest.samples_seen += self.manifest.global_batch_size;
            throughput.record(self.manifest.global_batch_size as f64);
            let line = self.record(&update, began.elapsed().as_secs_f64(), throughput.per_second(), telemetry);
            progress.advance(self.manifest.step, &line);
            let request = tally::request(&update.tallies);
            self.settle(request, requests)?;
            if request == Request::Stop && self.manifest.step < self.config.max_steps {
                tracing::info!("stopped after step {}, as was asked", self.manifest.step);
                return Ok(Ending::Stopped);
            }
        }
        Ok(Ending::Done)
    }

    fn step(&mut self, requests: &Requests, loader: &mut Loader) -> Result<Update> {
        let step = self.manifest.step + 1;
        pulse::begin_step(step);
        let stepper = Stepper {
            config: self.config,
            collective: self.collective,
            pipeline: &self.pipeline,
            share: self.share,
            check_stages: self.debug,
            requests,
            saving: 0,
        };
        let update = stepper.step(step, loader, &mut self.replica, &mut self.optimizer_state, &mut self.manifest.guard);
        let update = update.map_err(|error| self.with_way_back(error))?;
        self.count_bad_samples(&update.tallies)?;
        Ok(update)
    }

    /// Too many bad samples mean bad data, on every rank alike.
    fn count_bad_samples(&mut self, tallies: &[Tally]) -> Result<()> {
        let met = tallies.iter().map(|tally| tally.bad_samples as u64).sum();
        let epoch = self.order.epoch_of(self.manifest.step);
        let (count, samples) = (self.manifest.guard.bad_samples(epoch, met), self.dataset.num_samples());
        let allowed = (self.config.data.bad_share * samples as f64).ceil() as u64;
        if count <= allowed {
            return Ok(());
        }
        let what = format!("{count} samples of epoch {epoch} are not finite; data.bad_share allows {allowed} of {samples}");
        Err(known_to_all(Error::data(self.dataset.path(), what), 0, self.collective))
    }

    /// Says which checkpoint is the last one of before a step that was refused.
    fn with_way_back(&self, error: Error) -> Error {
        match (error, checkpoint::list(self.folder.path())) {
            (Error::NotFinite { step, what }, Ok(list)) => {
                let last = list.last().map_or("none was saved".into(), |(_, path)| path.display().to_string());
                Error::NotFinite { step, what: format!("{what}; last checkpoint: {last}") }
            }
            (error, _) => error,
        }
    }

    /// After a step: compares parameters and saves when it is time, or was asked for.
    fn settle(&mut self, request: Request, requests: &Requests) -> Result<()> {
        let saves = self.saves_now() || request != Request::Nothing;
        if saves || self.manifest.step.is_multiple_of(self.config.watchdog.compare_every_n_steps) {
            pulse::enter(Phase::Compare);
            divergence::check(&self.replica)?;
        }
        if request != Request::Nothing {
            requests.done();
        }
        if saves { self.save() } else { Ok(()) }
    }

    /// Logs what the policies ask for; returns the text beside the progress bar.
    fn record(&mut self, update: &Update, seconds: f64, samples_per_second: Option<f64>, telemetry: &Telemetry) -> String {
        let metrics = StepMetrics::new(
            update,
            metrics::Progress {
                step: self.manifest.step,
                epoch: self.order.epoch_of(self.manifest.step - 1),
                samples_seen: self.manifest.samples_seen,
                step_seconds: seconds,
                samples_per_second,
                peak_memory_bytes: peak_resident_bytes(),
            },
        );
        self.metrics.append(&metrics);
        let stragglers = self.stragglers.take(&update.tallies, self.config.watchdog.straggler_ratio);
        let skipped = update.skipped.iter().map(|why| format!("step {} was skipped: {why}", self.manifest.step));
        let bad: usize = update.tallies.iter().map(|tally| tally.bad_samples).sum();
        let bad = (bad > 0).then(|| format!("step {}: {bad} samples are not finite and were skipped", self.manifest.step));
        let warned = update.warning.iter().map(|what| format!("step {}: {what}", self.manifest.step));
        if telemetry.speaks_for_the_run() {
            skipped.chain(warned).chain(bad).chain(stragglers).for_each(|line| tracing::warn!("{line}"));
        }
        let flow = self.pipeline.settings();
        let due = |interval: u64| self.manifest.step.is_multiple_of(interval);
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
        let CheckpointSettings { every_n_steps, .. } = self.config.checkpoint;
        self.manifest.step.is_multiple_of(every_n_steps) || self.manifest.step == self.config.max_steps
    }

    fn save(&mut self) -> Result<()> {
        self.metrics.sync();
        let saved =
            Saved { manifest: &self.manifest, replica: &self.replica, optimizer: &*self.config.optimizer, state: &self.optimizer_state };
        let path = checkpoint::save(&self.folder, &saved, self.collective)?;
        tracing::info!("saved {}", path.display());
        self.folder.prune(self.config.checkpoint.keep_last, self.collective)
    }
}

/// Refuses a dataset of which the model cannot take some resolution group.
fn check_data(config: &RunConfig, dataset: &Dataset) -> Result<()> {
    dataset.groups().iter().try_for_each(|group| {
        let latents = dataset.latent_shape(&group.name).expect("a group has latents");
        let of = group.layout.iter().map(|(key, (_, shape))| (key.clone(), shape.clone())).collect();
        config.model.family.check_data(&SampleShapes { latents, of })
    })
}

/// This rank's part of the global batch.
fn share_of(config: &RunConfig, collective: &dyn Collective) -> Result<Share> {
    Ok(Share {
        rank: collective.rank(),
        world_size: collective.world_size(),
        micro_batches: config.micro_batches(collective.world_size())?,
        micro_batch_size: config.data.micro_batch_size_per_gpu,
        neighbours: config.parallel.neighbours_to_one_rank(),
    })
}

/// Where the optimizer's state lies between steps.
fn home(config: &RunConfig, device: Device) -> Device {
    if config.parallel.offload.optimizer() { Device::Cpu } else { device }
}

/// The configured model with all parameters zero, to be filled from a checkpoint.
fn empty_replica<'c>(config: &RunConfig, device: Device, sharing: Sharing<'c>) -> Result<Replica<'c>> {
    replica(config, device, sharing, None)
}

/// The configured model as a run begins with it: pretrained, or with parameters that follow from the seed alone.
///
/// # Ordering
/// Every rank calls it.
fn fresh_replica<'c>(config: &RunConfig, device: Device, sharing: Sharing<'c>, collective: &dyn Collective) -> Result<Replica<'c>> {
    if let Some(folder) = config.model.pretrained() {
        let mut replica = empty_replica(config, device, sharing)?;
        weights::load_pretrained(folder, &config.model.family, &mut replica, collective)?;
        return Ok(replica);
    }
    replica(config, device, sharing, Some(Key::new(config.seed, Purpose::Initialization)))
}

fn replica<'c>(config: &RunConfig, device: Device, sharing: Sharing<'c>, key: Option<Key>) -> Result<Replica<'c>> {
    let (stages, kind) = (config.model.family.stages()?, config.model.dtype.kind());
    Ok(Replica::shared(stages, kind, (device, home(config, device)), key, sharing))
}

fn build_pipeline(config: &RunConfig, device: Device) -> FlowMatchingPipeline {
    let flow = &config.flow_matching;
    FlowMatchingPipeline::new(flow.flow.clone(), flow.adapter.build(), device, config.model.dtype.kind())
}
