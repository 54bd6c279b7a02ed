//! `fm-dist sample`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::values::{Shape, parse_lora, parse_scale, parse_shape, parse_word};
use crate::error::Result;
use crate::flow::Solver;
use crate::phase::Phase;
use crate::pulse;
use crate::run::checkpoint::SavedWeights;
use crate::run::lora::AddedLora;
use crate::sample::prompts::{Prompt, SampleSize, read_prompts};
use crate::sample::{self, SampleRequest};

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("asked").args(["prompt", "prompts"]).multiple(true))]
pub struct SampleArgs {
    /// Run folder, or one of its checkpoints; without it, the published model in the pipeline's
    /// folder
    #[arg(long, value_name = "DIR", required_unless_present = "pipeline")]
    run: Option<PathBuf>,
    /// File to write, repeatable: .png and, for videos, .mp4 (of several samples of prompts
    /// NAME-0.png, NAME-1.png, …; of conditions one labelled grid), .safetensors for the latents
    #[arg(long, value_name = "FILE", required = true)]
    out: Vec<PathBuf>,
    /// Prompt of a sample; repeatable
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// File of prompts, one a line; in a .jsonl file a line is {"prompt": …}, and may have
    /// "negative", "seed" and "size"
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Folder of the family's published pipeline, whose text encoders encode prompts and whose
    /// autoencoder decodes; that of the run's [sampling] if unset. The demo's DiT needs none
    #[arg(long, value_name = "DIR", requires = "asked")]
    pipeline: Option<PathBuf>,
    /// Prompt from which guidance leads away; the empty one, where guidance needs one
    #[arg(long, value_name = "TEXT", requires = "asked")]
    negative: Option<String>,
    /// Size of the samples of prompts in pixels, and frames of videos; that of the run's data if
    /// unset
    #[arg(long, value_name = "WxH[xFRAMES]", requires = "asked")]
    size: Option<SampleSize>,
    /// Frames a second of videos; 0 selects the family's own
    #[arg(long, value_name = "N", requires = "asked", value_parser = clap::value_parser!(i64).range(0..=240))]
    fps: Option<i64>,
    /// Program that writes videos; ffmpeg in PATH if unset
    #[arg(long, value_name = "FILE", requires = "asked")]
    ffmpeg: Option<PathBuf>,
    /// Setting of the published model's configuration, as parallel.device=cpu; repeatable
    #[arg(long = "set", value_name = "KEY.PATH=VALUE", conflicts_with = "run")]
    overrides: Vec<String>,
    /// Conditions to generate from instead of the dataset's: tensors [N, …] under the adapter's
    /// keys, optionally `negative.` ones and the initial `noise`; `data_type` and `task_type` in
    /// the metadata
    #[arg(long, value_name = "FILE.safetensors", conflicts_with = "asked")]
    conditions: Option<PathBuf>,
    /// Shape of one sample's latents without a given `noise`; that of the dataset's first
    /// resolution group if unset
    #[arg(long, value_name = "C,[F,]H,W", value_parser = parse_shape, conflicts_with = "asked")]
    shape: Option<Shape>,
    /// Steps from noise to data
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
    /// Constant shift of the noise levels; 0 selects the pipeline's or the family's own rule
    #[arg(long, value_parser = parse_scale)]
    shift: Option<f64>,
    /// Way of a step: euler or unipc; the pipeline's or the family's own if unset
    #[arg(long, value_name = "WORD", value_parser = parse_word::<Solver>)]
    solver: Option<Solver>,
    /// Number of samples for each condition or prompt; one for each prompt, and for each condition
    /// of a file, if unset
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..=10_000))]
    per_condition: Option<i64>,
    /// Seed of the noise; each further sample of prompts has the next number
    #[arg(long)]
    seed: Option<u64>,
    /// Strength of the run's LoRA; 0 is the model without it
    #[arg(long, value_parser = parse_scale, default_value_t = 1.0)]
    lora_scale: f64,
    /// Generate with the average of the weights (`[ema]`) instead of the weights
    #[arg(long, requires = "run")]
    ema: bool,
    /// LoRA of any dialect that is added to the model, also beside the run's own, and its strength;
    /// repeatable
    #[arg(long, value_name = "FILE[:SCALE]", value_parser = parse_lora)]
    lora: Vec<AddedLora>,
}

impl SampleArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let mut prompts: Vec<Prompt> = self.prompt.iter().map(|text| Prompt::new(text)).collect();
        if let Some(path) = &self.prompts {
            prompts.extend(read_prompts(path)?);
        }
        let request = SampleRequest {
            run: self.run,
            out: self.out,
            conditions: self.conditions,
            shape: self.shape.map(|shape| shape.0),
            prompts,
            pipeline: self.pipeline,
            negative: self.negative,
            size: self.size,
            fps: self.fps,
            ffmpeg: self.ffmpeg,
            overrides: self.overrides,
            num_steps: self.steps,
            guidance_scale: self.guidance,
            true_cfg_scale: self.true_cfg_scale,
            shift: self.shift,
            solver: self.solver,
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
