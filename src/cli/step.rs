//! `fm-dist step`.

use std::path::PathBuf;

use clap::Args;

use super::config::ConfigArgs;
use crate::commands::{self, StepRequest};
use crate::error::Result;

#[derive(Args, Debug)]
pub struct StepArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Batch under the reference's keys, `data_type` in the metadata
    #[arg(long, value_name = "B.safetensors")]
    batch: PathBuf,
    /// Where the numbers go
    #[arg(long, value_name = "OUT.safetensors")]
    dump: PathBuf,
    /// Parameters of this run or checkpoint folder instead of those that a run begins with
    #[arg(long, value_name = "DIR")]
    weights: Option<PathBuf>,
    /// What `torch.manual_seed` gets on the other side; the configured seed without it
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    torch_seed: Option<i64>,
    /// Also gradients of the average weighted loss, as `grad.<parameter>`
    #[arg(long)]
    grads: bool,
}

impl StepArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let StepArgs { config, batch, dump, weights, torch_seed, grads } = self;
        let request = StepRequest { batch, dump, weights, torch_seed, grads };
        commands::dump_step(&config.read()?, &request).map(|()| 0)
    }
}
