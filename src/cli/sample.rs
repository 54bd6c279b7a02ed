//! `fm-dist sample`.

use std::path::PathBuf;

use clap::Args;

use super::values::{Shape, parse_lora, parse_scale, parse_shape};
use crate::error::Result;
use crate::phase::Phase;
use crate::pulse;
use crate::run::checkpoint::SavedWeights;
use crate::run::lora::AddedLora;
use crate::sample::{self, SampleRequest};

#[derive(Args, Debug)]
pub struct SampleArgs {
    /// Run folder, or one of its checkpoints
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// File to write: .png for a labelled grid, .safetensors for the numbers; repeatable
    #[arg(long, value_name = "FILE", required = true)]
    out: Vec<PathBuf>,
    /// Conditions to generate from instead of the dataset's: tensors [N, …] under the adapter's
    /// keys, optionally `negative.` ones and the initial `noise`; `data_type` and `task_type` in
    /// the metadata
    #[arg(long, value_name = "FILE.safetensors")]
    conditions: Option<PathBuf>,
    /// Shape of one sample's latents without a given `noise`; that of the dataset's first
    /// resolution group if unset
    #[arg(long, value_name = "C,[F,]H,W", value_parser = parse_shape)]
    shape: Option<Shape>,
    /// Euler steps from noise to data
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    steps: Option<i64>,
    /// Scale of classifier-free guidance (1 disables it), or the guidance input of a model that
    /// embeds it; 0 selects the family's own
    #[arg(long, value_parser = parse_scale)]
    guidance: Option<f64>,
    /// Scale of classifier-free guidance from negative conditions, in addition to an embedded
    /// guidance
    #[arg(long, value_parser = parse_scale)]
    true_cfg_scale: Option<f64>,
    /// Constant shift of the noise levels; 0 selects the family's own rule
    #[arg(long, value_parser = parse_scale)]
    shift: Option<f64>,
    /// Number of samples for each condition; one for each condition of a file if unset
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    per_condition: Option<i64>,
    /// Seed of the noise
    #[arg(long)]
    seed: Option<u64>,
    /// Strength of the run's LoRA; 0 is the model without it
    #[arg(long, value_parser = parse_scale, default_value_t = 1.0)]
    lora_scale: f64,
    /// Generate with the average of the weights (`[ema]`) instead of the weights
    #[arg(long)]
    ema: bool,
    /// LoRA of any dialect that is added to the model, also beside the run's own, and its strength;
    /// repeatable
    #[arg(long, value_name = "FILE[:SCALE]", value_parser = parse_lora)]
    lora: Vec<AddedLora>,
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
            lora_scale: self.lora_scale,
            weights: SavedWeights::averaged_if(self.ema),
            loras: self.lora,
        };
        pulse::enter(Phase::Report);
        sample::sample(&request).map(|()| 0)
    }
}
