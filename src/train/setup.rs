//! How a run comes together: data, model, optimizer, and the checkpoint that it goes on from.

use std::sync::Arc;

use tch::Device;

use crate::assembly::{build_pipeline, empty_replica, fresh_replica, home, share_of};
use crate::collective::Collective;
use crate::collective::agreement::{agree, agreed};
use crate::config::RunConfig;
use crate::data::{Dataset, Order};
use crate::error::Result;
use crate::flow::Note;
use crate::libtorch;
use crate::nn::AttentionKernels;
use crate::ops;
use crate::parallel::divergence;
use crate::parallel::{Sharding, Sharing};
use crate::phase::Phase;
use crate::plan::check_data;
use crate::run::changes;
use crate::run::checkpoint::{self, Manifest, Saver};
use crate::run::folder::RunFolder;
use crate::run::optimizer_state::OptimizerState;
use crate::settings::Choice;
use crate::telemetry::Telemetry;
use crate::train::TrainOptions;
use crate::train::inject;
use crate::train::stragglers::Stragglers;
use crate::train::trainer::Trainer;

impl<'c> Trainer<'c> {
    /// At the first step, or behind the checkpoint that the run folder goes on from.
    ///
    /// # Errors
    /// Whatever the data, the model, the checkpoint or a collective returns.
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
        let share = share_of(config, collective)?;
        let global_batch = share.global_batch();
        let dataset = Arc::new(Dataset::named(&config.data.path)?.on_bad(config.data.on_bad));
        let notes = check_data(config, &dataset)?;
        let order = Order::new(dataset.groups(), global_batch, config.seed)?;
        // Where gradients are sharded memory is short, and what is kept fits no other use: 13 %
        // more were measured.
        if !config.parallel.sharding.scatters_each_micro_batch() {
            libtorch::keep_freed_memory();
        }
        let parallel = &config.parallel;
        let sharing = Sharing::new(
            collective,
            parallel.sharding,
            parallel.sharding_group,
            parallel.grains(share.micro_batches),
        )?;
        let mut replica = match folder.resumed_from() {
            Some(_) => empty_replica(config, device, sharing)?,
            None => fresh_replica(config, device, sharing, collective)?,
        };
        if let (None, Some(weights)) = (folder.resumed_from(), config.model.pretrained()) {
            tracing::info!("weights from {}", weights.display());
        }
        let fresh =
            OptimizerState::fresh(&replica, &*config.optimizer, (device, home(config, device)));
        let mut optimizer_state = agreed(fresh, collective)?;
        let mut manifest = Manifest::new(config, global_batch as u64, dataset.fingerprint());
        if let Some(path) = folder.resumed_from() {
            let allowed = options.allow_data_change;
            let loaded = checkpoint::load(
                path,
                config,
                &manifest,
                allowed,
                &mut replica,
                &*config.optimizer,
                &mut optimizer_state,
            );
            let outcome = loaded.map(|loaded| manifest = loaded);
            agree(outcome.map(|()| String::new()), collective)?;
            folder.note_start(manifest.step, config.max_steps, collective)?;
            tracing::info!("resumed from {} at step {}", path.display(), manifest.step);
        }
        inject::parameters(Phase::Open, &mut replica);
        divergence::check(&replica, collective.rank())?;
        folder.keep_config(config, collective)?;
        if let (Some(what), true) = (jump_of_lr(config, &manifest), telemetry.speaks_for_the_run())
        {
            tracing::warn!("{what}");
        }
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
            stragglers: Stragglers::default(),
            saver,
        };
        trainer.announce(global_batch);
        if telemetry.speaks_for_the_run() {
            notes.iter().for_each(tell);
        }
        Ok(trainer)
    }

    fn announce(&self, global_batch: usize) {
        let (parameters, stages) = (self.replica.num_parameters(), self.replica.stages.len());
        tracing::info!(
            "model {parameters} parameters in {stages} stages, {:?}",
            self.config.model.dtype
        );
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
        tracing::info!("{}", ops::way(self.device));
        if let (Device::Cuda(_), AttentionKernels::Auto) =
            (self.device, self.config.compute.attention)
        {
            tracing::info!(
                "attention without cuDNN's kernels, of which some fail in backward passes; compute.attention = \"cudnn\" allows them"
            );
        }
        self.announce_sharing();
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

fn tell(note: &Note) {
    match note {
        Note::Warning(text) => tracing::warn!("{text}"),
        Note::Information(text) => tracing::info!("{text}"),
    }
}

/// The warning of a learning rate that does not go on as the checkpoint's run had led it.
fn jump_of_lr(config: &RunConfig, manifest: &Manifest) -> Option<String> {
    changes::jump_of_lr(
        config,
        manifest.lr?,
        manifest.step,
        manifest.guard.update_number(manifest.step),
    )
}
