//! `fm-dist config`, and how every command reads its configuration.

use std::path::PathBuf;

use clap::Args;

use super::files::{read_text, say};
use crate::config::{self, RunConfig};
use crate::error::Result;

#[derive(Args, Debug)]
pub struct ConfigArgs {
    /// Configuration file (TOML); the embedded digits if unset
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key; repeatable
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    overrides: Vec<String>,
}

impl ConfigArgs {
    /// The configuration that was named, or the embedded one, with its overrides.
    pub fn read(&self) -> Result<RunConfig> {
        match &self.config {
            None => RunConfig::read(config::DEFAULT_NAME, config::DEFAULT, &self.overrides),
            Some(path) => RunConfig::read(
                &path.display().to_string(),
                &read_text(path, "--config")?,
                &self.overrides,
            ),
        }
    }

    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        say(&self.read()?.to_toml())
    }
}
