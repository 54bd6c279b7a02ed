//! The only room where science and machinery meet: the loop, and when it logs, saves and samples.

mod agreement;
mod check;
mod checkpoint;
mod conditions;
mod divergence;
mod export;
mod generate;
mod lock;
mod metrics;
mod place;
mod report;
mod run_folder;
mod single_step;
mod starts;
mod state;
mod step;
mod weights;

pub use check::{CheckRequest, check};
pub use export::{ExportRequest, export};
pub use generate::{SampleRequest, sample};
pub use run_folder::Resume;
pub use single_step::{StepRequest, dump_step};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tch::Device;

use crate::collective::Collective;
use crate::config::{CheckpointSettings, RunConfig};
use crate::data::{Dataset, Loader, Order, Share};
use crate::error::{Error, Result};
use crate::flow::{FlowMatchingPipeline, report as flow_report};
use crate::model::SampleShapes;
use crate::parallel::{Replica, Sharding, Sharing};
use crate::rng::{Key, Purpose};
use crate::settings::Choice;
use crate::telemetry::{self, MetricsFile, Telemetry, Throughput, peak_resident_bytes};
use agreement::{agree, on_rank_zero};
use checkpoint::{Manifest, Saved, Saver};
use metrics::StepMetrics;
use place::Place;
use run_folder::RunFolder;
use state::OptimizerState;
use step::{Stepper, Update};

/// Steps over which throughput is averaged.
const THROUGHPUT_STEPS: usize = 20;

/// How a run begins and what it looks at, from the command line.
#[derive(Clone, Debug, Default)]
pub struct TrainOptions {
    pub resume: Resume,
    /// One process, detailed logs each step, every stage searched for non-finite values.
    pub debug: bool,
    /// Go on from a checkpoint of other data.
    pub allow_data_change: bool,
}

/// Trains from the first step, or the resumed one, to `max_steps`; returns the run folder. Every rank calls it.
///
/// # Errors
/// Whatever ends the run; the caller tells the other ranks by ending the world.
pub fn train(config: &RunConfig, options: &TrainOptions, world: &dyn Collective) -> Result<PathBuf> {
    let place = Place::take(config, world)?;
    let outcome = train_at(&place, config, options, place.collective(world));
    if outcome.is_err() {
        place.abandon();
    }
    outcome
}

fn train_at(place: &Place, config: &RunConfig, options: &TrainOptions, collective: &dyn Collective) -> Result<PathBuf> {
    let folder = RunFolder::open(config, &options.resume, collective)?;
    let telemetry = telemetry::start(&config.log, collective.rank(), collective.world_size(), folder.path());
    telemetry.cover_all_threads();
    if telemetry.speaks_for_the_run() {
        folder.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
    }
    let mut trainer = Trainer::new(config, options, collective, place.device, &telemetry, folder)?;
    trainer.run(&telemetry)?;
    report::write(config, &trainer.folder, &trainer.replica, &trainer.dataset, trainer.device, collective)?;
    tracing::info!("run folder {}", trainer.folder.path().display());
    Ok(trainer.folder.path().into())
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
    saver: Saver,
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
        let dataset = Arc::new(Dataset::named(&config.data.path)?);
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
            let allowed = options.allow_data_change;
            let loaded = checkpoint::load(path, &manifest, allowed, &mut replica, &*config.optimizer, &mut optimizer_state);
            let outcome = loaded.map(|loaded| manifest = loaded);
            agree(outcome.map(|()| String::new()), collective)?;
            folder.note_start(manifest.step, config.max_steps, collective)?;
            tracing::info!("resumed from {} at step {}", path.display(), manifest.step);
        }
        folder.keep_config(config, collective)?;
        let metrics = telemetry.metrics_after(manifest.step)?;
        let pipeline = build_pipeline(config, device);
        let saver = Saver::new(folder.path().into(), config.checkpoint.clone());
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
            saver,
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

    fn run(&mut self, telemetry: &Telemetry) -> Result<()> {
        let (dataset, order) = (Arc::clone(&self.dataset), self.order.clone());
        let mut loader = Loader::start(dataset, order, self.share, self.manifest.step, self.config.data.prefetch)?;
        let mut progress = telemetry.progress(self.config.max_steps, self.manifest.step);
        let mut throughput = Throughput::new(THROUGHPUT_STEPS);
        throughput.record(0.0);
        while self.manifest.step < self.config.max_steps {
            let began = Instant::now();
            let update = self.step(&mut loader)?;
            self.manifest.step += 1;
            self.manifest.samples_seen += self.manifest.global_batch_size;
            throughput.record(self.manifest.global_batch_size as f64);
            let line = self.record(&update, began.elapsed().as_secs_f64(), throughput.per_second());
            progress.advance(self.manifest.step, &line);
            self.saver.poll(self.collective)?;
            if self.saves_now() {
                self.save()?;
            }
        }
        self.saver.finish(self.collective)
    }

    fn step(&mut self, loader: &mut Loader) -> Result<Update> {
        let step = self.manifest.step + 1;
        let optimizer = &*self.config.optimizer;
        let stepper = Stepper {
            config: self.config,
            collective: self.collective,
            pipeline: &self.pipeline,
            share: self.share,
            check_stages: self.debug,
            lr: optimizer.lr() * self.config.lr_scheduler.factor(step, self.config.max_steps),
        };
        stepper.step(step, loader, &mut self.replica, &mut self.optimizer_state)
    }

    /// Logs what the policies ask for; returns the text beside the progress bar.
    fn record(&mut self, update: &Update, seconds: f64, samples_per_second: Option<f64>) -> String {
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
        divergence::check(&self.replica)?;
        self.metrics.sync();
        let saved =
            Saved { manifest: &self.manifest, replica: &self.replica, optimizer: &*self.config.optimizer, state: &self.optimizer_state };
        self.saver.begin(&saved, self.collective)
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

/// The configuration that rank 0 read and found fit for this world and its data, on every rank; rank 0's error is everybody's.
///
/// # Errors
/// Rank 0's own on rank 0, [`Error::Peer`] with its code on the others.
pub fn share_config(read: impl FnOnce() -> Result<RunConfig>, options: &TrainOptions, collective: &dyn Collective) -> Result<RunConfig> {
    let fit = || {
        let config = read()?;
        // What every rank would stumble over alike is said once, before anything is written.
        check(&config, &CheckRequest { world_size: collective.world_size(), latents: None, text_tokens: 0 })?;
        match (options.debug, collective.world_size()) {
            (true, ranks) if ranks > 1 => {
                Err(Error::config("--debug", format!("is for one process, found {ranks}; start it without mpirun")))
            }
            _ => Ok(config.to_toml()),
        }
    };
    RunConfig::read("rank 0's configuration", &on_rank_zero(collective, fit)?, &[])
}
