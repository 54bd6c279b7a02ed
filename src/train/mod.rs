//! The training loop: steps, and their logging, comparing and saving. The flow-matching code and
//! the distributed code meet here.

mod diagnose;
mod draws;
mod handshake;
mod inject;
mod latents;
mod metrics;
mod report;
mod sampling;
mod setup;
mod step;
mod step_report;
mod stragglers;
mod trainer;
mod validation;

pub use handshake::{begin, share_config};

use std::path::PathBuf;
use std::time::Instant;

use crate::assembly::device::RankDevice;
use crate::assembly::length;
use crate::collective::Collective;
use crate::collective::agreement::{agreed, known_to_all};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::failure;
use crate::fault;
use crate::ops;
use crate::optim::lr;
use crate::phase::Phase;
use crate::pulse;
use crate::run::checkpoint::AllowedChanges;
use crate::run::folder::RunFolder;
use crate::run::requests::Requests;
use crate::run::{Resume, StopFlag};
use crate::telemetry::{self, Telemetry};
use trainer::Trainer;

/// Command-line options of a run.
#[derive(Clone, Debug, Default)]
pub struct TrainOptions {
    pub resume: Resume,
    /// One process, detailed logs at each step, and a search of every stage for non-finite values.
    pub debug: bool,
    /// Changes with which a checkpoint is resumed all the same.
    pub allowed: AllowedChanges,
    /// Flag that signals set.
    pub stop: StopFlag,
    /// Time at which the run saves and stops.
    pub stop_at: Option<Instant>,
    /// Warning of the start-up, to be logged.
    pub warning: Option<String>,
}

/// The way in which a run ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The run reached its last step.
    Done,
    /// The run stopped earlier by request, with a checkpoint to resume from.
    Stopped,
}

/// Trains from the first step, or the resumed one, to the last or a request to stop. Returns the
/// run folder and the way in which the run ended. Every rank calls it.
///
/// # Errors
/// Any error that ends the run; the caller ends the world, which informs the other ranks.
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
    let length = agreed(length(config, collective.world_size()), collective)?;
    let folder = RunFolder::open(config, &options.resume, length, collective)?;
    let config = &RunConfig { max_steps: folder.last_step(length), ..config.clone() };
    let telemetry =
        telemetry::start(&config.log, collective.rank(), collective.world_size(), folder.path());
    telemetry.cover_all_threads();
    failure::set_folder(folder.path());
    let done = folder.nothing_to_do(length);
    if telemetry.writes_run_files() {
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
    if telemetry.writes_run_files() {
        device.notes.iter().for_each(setup::tell);
    }
    let listens = telemetry.writes_run_files().then(|| folder.path().to_path_buf());
    let requests = Requests::new(options.stop.clone(), options.stop_at, listens);
    let mut trainer = Trainer::new(config, options, collective, device.device, &telemetry, folder)?;
    let ended = run_and_report(&mut trainer, &requests, &telemetry);
    if ended.is_err() {
        trainer.replica.abandon_peers();
    }
    let ending = ended?;
    if let Some(fallbacks) = ops::fallbacks() {
        tracing::info!("{fallbacks}");
    }
    tracing::info!("run folder {}", trainer.folder.path().display());
    Ok((trainer.folder.path().into(), ending))
}

fn run_and_report(
    trainer: &mut Trainer<'_>,
    requests: &Requests,
    telemetry: &Telemetry,
) -> Result<Ending> {
    let ending = trainer.run(requests, telemetry)?;
    if ending == Ending::Done {
        pulse::enter(Phase::Report);
        report::write(trainer, requests)?;
    }
    Ok(ending)
}
