//! `fm-dist runs`.

use clap::Args;

use super::config::ConfigArgs;
use super::files::say;
use crate::commands::{self, ListingFormat};
use crate::error::Result;

#[derive(Args, Debug)]
pub struct RunsArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Write one JSON object
    #[arg(long)]
    json: bool,
    /// Write assignments that a shell can `eval`: output_dir, latest_run, newest_step, finished
    #[arg(long, conflicts_with = "json")]
    shell: bool,
}

impl RunsArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let format = match (self.json, self.shell) {
            (true, _) => ListingFormat::Json,
            (_, true) => ListingFormat::Shell,
            _ => ListingFormat::Text,
        };
        say(&commands::list_runs(&self.config.read()?, format)?)
    }
}
