//! `fm-dist sample`.

use std::path::PathBuf;

use clap::Args;

use super::values::{Shape, parse_scale, parse_shape};
use crate::error::Result;
use crate::sample::{self, SampleRequest};

#[derive(Args, Debug)]
pub struct SampleArgs {
    /// Run folder, or one of its checkpoints
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// File to write: .png for a labelled grid, .safetensors for the numbers; may be given again
    #[arg(long, value_name = "FILE", required = true)]
    out: Vec<PathBuf>,
    /// Conditions to generate from instead of the dataset's: tensors [N, …] under the adapter's
    /// keys, perhaps `negative.` ones and the `noise` to start from; `data_type` and `task_type` in
    /// the metadata
    #[arg(long, value_name = "FILE.safetensors")]
    conditions: Option<PathBuf>,
    /// Shape of one sample's latents where no `noise` has it; that of the dataset's first
    /// resolution group without it
    #[arg(long, value_name = "C,[F,]H,W", value_parser = parse_shape)]
    shape: Option<Shape>,
    /// Euler steps from noise to data
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    steps: Option<i64>,
    /// Classifier-free guidance (1 is none), or what a model that embeds its guidance is fed; 0 is
    /// the family's own
    #[arg(long, value_parser = parse_scale)]
    guidance: Option<f64>,
    /// Classifier-free guidance away from negative conditions, on top of an embedded one
    #[arg(long, value_parser = parse_scale)]
    true_cfg_scale: Option<f64>,
    /// Constant shift of the noise levels; 0 is the family's own way
    #[arg(long, value_parser = parse_scale)]
    shift: Option<f64>,
    /// Samples for each condition; one of a file's unless this is given
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    per_condition: Option<i64>,
    /// Seed of the noise
    #[arg(long)]
    seed: Option<u64>,
}

impl SampleArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let request = SampleRequest {
            run: self.run,
            out: self.out,
            conditions: self.conditions,
            shape: self.shape.map(|shape| shape.0),
            num_steps: self.steps,
            guidance_scale: self.guidance,
            true_cfg_scale: self.true_cfg_scale,
            shift: self.shift,
            per_condition: self.per_condition,
            seed: self.seed,
        };
        sample::sample(&request).map(|()| 0)
    }
}
