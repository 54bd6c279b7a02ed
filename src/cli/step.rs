//! `fm-dist step`.

use std::path::PathBuf;

use clap::Args;

use super::config::ConfigArgs;
use super::files::say;
use crate::commands::{self, StepRequest};
use crate::error::Result;

#[derive(Args, Debug)]
pub struct StepArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Batch under the reference's keys, with `data_type` in the metadata
    #[arg(long, value_name = "B.safetensors")]
    batch: PathBuf,
    /// File to write
    #[arg(long, value_name = "OUT.safetensors")]
    dump: PathBuf,
    /// Run or checkpoint folder with the parameters; the initial parameters of a run if unset
    #[arg(long, value_name = "DIR")]
    weights: Option<PathBuf>,
    /// Seed given to `torch.manual_seed` in the other implementation; the configured seed if unset
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    torch_seed: Option<i64>,
    /// Also write the gradients of the average weighted loss, as `grad.<parameter>`
    #[arg(long)]
    grads: bool,
    /// Also print how often each operator ran and the bytes that it moved: with `--grads` nearly
    /// what a GPU does in a step
    #[arg(long)]
    operators: bool,
}

impl StepArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let StepArgs { config, batch, dump, weights, torch_seed, grads, operators } = self;
        let request = StepRequest { batch, dump, weights, torch_seed, grads, operators };
        say(&commands::dump_step(&config.read()?, &request)?)
    }
}
