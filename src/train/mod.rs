//! The loop: steps of training, and when they are logged, compared and saved. Science and machinery
//! meet here.

mod diagnose;
mod handshake;
mod inject;
mod latents;
mod metrics;
mod report;
mod setup;
mod step;
mod step_report;
mod stragglers;
mod trainer;

pub use handshake::{begin, share_config};

use std::path::PathBuf;
use std::time::Instant;

use crate::assembly::device::RankDevice;
use crate::collective::Collective;
use crate::collective::agreement::known_to_all;
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::failure;
use crate::fault;
use crate::ops;
use crate::optim::lr;
use crate::phase::Phase;
use crate::pulse;
use crate::run::folder::RunFolder;
use crate::run::requests::Requests;
use crate::run::{Resume, StopFlag};
use crate::telemetry;
use trainer::Trainer;

/// How a run begins and what it looks at, from the command line.
#[derive(Clone, Debug, Default)]
pub struct TrainOptions {
    pub resume: Resume,
    /// One process, detailed logs each step, every stage searched for non-finite values.
    pub debug: bool,
    /// Go on from a checkpoint of other data.
    pub allow_data_change: bool,
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

/// Trains from the first step, or the resumed one, to `max_steps` or a request to stop; returns the
/// run folder. Every rank calls it.
///
/// # Errors
/// Whatever ends the run; the caller tells the other ranks by ending the world.
pub fn train(
    config: &RunConfig,
    options: &TrainOptions,
    world: &dyn Collective,
) -> Result<(PathBuf, Ending)> {
    pulse::enter(Phase::Open);
    if let (Some(warning), true) = (&options.warning, config.parallel.deterministic) {
        return Err(known_to_all(
            Error::environment(format!("{warning}: parallel.deterministic needs one kind")),
            0,
            world,
        ));
    }
    tch::set_num_threads(config.parallel.num_threads);
    let device = RankDevice::open(config, world)?;
    let outcome = train_on(&device, config, options, device.collective(world));
    if outcome.is_err() {
        device.leak();
    }
    outcome
}

fn train_on(
    device: &RankDevice,
    config: &RunConfig,
    options: &TrainOptions,
    collective: &dyn Collective,
) -> Result<(PathBuf, Ending)> {
    let folder = RunFolder::open(config, &options.resume, collective)?;
    let telemetry =
        telemetry::start(&config.log, collective.rank(), collective.world_size(), folder.path());
    telemetry.cover_all_threads();
    failure::set_folder(folder.path());
    let done = folder.nothing_to_do(config.max_steps);
    if telemetry.speaks_for_the_run() {
        let fault = fault::ordered()
            .map(|order| format!("debug.inject_fault = \"{order}\": this run breaks on purpose"));
        let schedule =
            lr::warning(&config.lr_scheduler, config.max_steps).filter(|_| done.is_none());
        folder
            .warnings()
            .iter()
            .chain(&options.warning)
            .chain(&fault)
            .chain(&schedule)
            .for_each(|warning| tracing::warn!("{warning}"));
    }
    if let Some(what) = done {
        tracing::info!("{what}");
        return Ok((folder.path().into(), Ending::Done));
    }
    let listens = telemetry.speaks_for_the_run().then(|| folder.path().to_path_buf());
    let requests = Requests::new(options.stop.clone(), options.stop_at, listens);
    let mut trainer = Trainer::new(config, options, collective, device.device, &telemetry, folder)?;
    let ending = trainer.run(&requests, &telemetry)?;
    if ending == Ending::Done {
        pulse::enter(Phase::Report);
        report::write(
            config,
            &trainer.folder,
            &trainer.replica,
            &trainer.dataset,
            trainer.device,
            collective,
            &requests,
        )?;
    }
    if let Some(fallbacks) = ops::fallbacks() {
        tracing::info!("{fallbacks}");
    }
    tracing::info!("run folder {}", trainer.folder.path().display());
    Ok((trainer.folder.path().into(), ending))
}
