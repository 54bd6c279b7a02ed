//! Parses the command line and calls the commands.
//!
//! A command is a file here, with its arguments and what it does with them, and a line of
//! `commands!`.

mod attention_trial;
mod check;
mod config;
mod convert;
mod data;
mod doctor;
mod export;
mod files;
mod runs;
mod sample;
mod step;
mod train;
mod values;

use clap::{Parser, Subcommand};

use crate::collective;
use crate::error::Result;

/// Trains diffusion transformers by flow matching, one process for each GPU.
///
/// `mpirun -n 8 fm-dist`, or plain `fm-dist` for one process. Without a file it runs the embedded
/// default configuration, which learns to draw handwritten digits in about two minutes.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, help_expected = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: train::TrainArgs,
}

/// Declares the commands: a line of help, then name and arguments, which run themselves. A hidden
/// command is for the program itself.
macro_rules! commands {
    ($( $(#[$attribute:meta])+ $name:ident($arguments:ty), )+) => {
        #[derive(Debug, Subcommand)]
        enum Command { $( $(#[$attribute])+ $name(Box<$arguments>), )+ }

        impl Command {
            fn run(self) -> Result<i32> {
                match self { $( Command::$name(arguments) => (*arguments).run(), )+ }
            }
        }
    };
}

commands! {
    /// Train; the command when none is given
    Train(train::TrainArgs),
    /// Generate samples of a trained run
    Sample(sample::SampleArgs),
    /// Write a run's parameters as a diffusers transformer folder
    Export(export::ExportArgs),
    /// Write a LoRA in another format: diffusers, comfyui, kohya or peft
    Convert(convert::ConvertArgs),
    /// Run one flow-matching step and write every number of it
    Step(step::StepArgs),
    /// Show the plan of a configuration without running it
    Check(check::CheckArgs),
    /// Make and describe datasets
    Data(data::DataArgs),
    /// List the runs of an output_dir, their newest checkpoints, and which of them are finished
    Runs(runs::RunsArgs),
    /// Show which requirements this machine meets and which it lacks
    Doctor(doctor::DoctorArgs),
    /// Print the resolved configuration, with one comment line for each key
    Config(config::ConfigArgs),
    /// Try a backend of attention, for the run that starts it
    #[command(hide = true)]
    AttentionTrial(attention_trial::AttentionTrialArgs),
}

impl Cli {
    /// Runs the parsed command. Returns its exit code.
    ///
    /// # Errors
    /// The command's own.
    pub fn run(self) -> Result<i32> {
        let command = self.command.unwrap_or(Command::Train(Box::new(self.train)));
        match collective::launched_rank() {
            Some(1..) if command.only_prints() => Ok(0),
            _ => command.run(),
        }
    }
}

impl Command {
    /// True if all ranks of a launch would print the same, which the first one does alone. Files
    /// are left to each rank: a launch may give each another one to make.
    fn only_prints(&self) -> bool {
        matches!(self, Command::Check(_) | Command::Config(_) | Command::Runs(_))
    }
}
