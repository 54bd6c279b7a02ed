//! `fm-dist train`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::config::ConfigArgs;
use super::values::parse_moment;
use crate::collective::{self, Launch};
use crate::error::{Result, STOPPED};
use crate::fault;
use crate::phase::Phase;
use crate::pulse;
use crate::run::checkpoint::AllowedChanges;
use crate::run::{Resume, StopFlag};
use crate::train::{self, Ending, TrainOptions};
use crate::watchdog::Watchdog;

#[derive(Args, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Start a new run (never), resume from the newest checkpoint that verifies (latest), resume if
    /// there is one and start a new run otherwise (auto), or resume from this run or checkpoint
    /// folder
    #[arg(long, value_name = "never|latest|auto|DIR", default_value = "never")]
    resume: Resume,
    /// Connection of the processes: MPI under a launcher (auto), MPI (mpi), or TCP where MPI cannot
    /// start (tcp). Not a key of the configuration, because the world must exist before rank 0 can
    /// send its configuration
    #[arg(long, value_name = "auto|mpi|tcp", default_value = "auto")]
    launch: Launch,
    /// Start a new run that goes on from this checkpoint, or from the newest one of this run folder
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    branch: Option<PathBuf>,
    /// Resume from a checkpoint even if the data differ from those it was trained on
    #[arg(long)]
    allow_data_change: bool,
    /// Resume from a checkpoint even if the global batch differs: the order goes on after the
    /// samples that were seen
    #[arg(long)]
    allow_batch_change: bool,
    /// One process, detailed logs at each step, and a search of every stage for non-finite values
    #[arg(long)]
    debug: bool,
    /// Save and stop after this time, e.g. 55m, with exit code 10; `--resume latest` continues
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    stop_after: Option<Instant>,
}

impl TrainArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let stop = StopFlag::on_signals()?;
        // Read by every rank: settings that protect the start-up must apply before ranks can
        // communicate.
        let config = self.config.read();
        let known = config.as_ref().ok();
        known.and_then(|config| config.debug.inject_fault.clone()).into_iter().for_each(fault::arm);
        let limits = known.map(|config| config.watchdog.clone()).unwrap_or_default();
        let timeout = limits.connect_timeout();
        let watchdog = Watchdog::start(limits)?;
        pulse::enter(Phase::Connect);
        let world = collective::connect(self.launch, timeout)?;
        let warning = train::begin(&watchdog, world.as_ref())?;
        let options = TrainOptions {
            resume: self.branch.map_or(self.resume, Resume::Branch),
            debug: self.debug,
            allowed: AllowedChanges {
                data: self.allow_data_change,
                batch: self.allow_batch_change,
            },
            stop,
            stop_at: self.stop_after,
            warning,
        };
        let config = match train::share_config(config, &options, world.as_ref()) {
            Ok(config) => config,
            // Every rank has the error, so that all can finish in good order.
            Err(error) => return collective::finish_with(error, world),
        };
        watchdog.configure(config.watchdog.clone());
        let (_, ending) = train::train(&config, &options, world.as_ref())?;
        collective::finish(world)?;
        Ok(if ending == Ending::Stopped { STOPPED } else { 0 })
    }
}
