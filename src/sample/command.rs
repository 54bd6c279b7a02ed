//! `fm-dist sample`: samples of a run, or of a published pipeline's own model.

use std::path::PathBuf;

use tch::Device;

use crate::assembly::attention::tokens_of_sample;
use crate::assembly::device::{device, open_libraries};
use crate::assembly::{dataset, frozen_replica, trained_replica};
use crate::collective::Solo;
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::files::outputs::Named;
use crate::flow::Solver;
use crate::nn::Tokens;
use crate::parallel::Replica;
use crate::run::checkpoint::SavedWeights;
use crate::run::folder;
use crate::run::locate::locate;
use crate::run::lora::{AddedLora, AddedLoras};
use crate::sample::Scheduler;
use crate::sample::conditions::Origin;
use crate::sample::generate::Plan;
use crate::sample::outputs::{
    Files, Format, check_outputs, format_of, frames_per_second, write_samples,
};
use crate::sample::pretrained::pretrained_config;
use crate::sample::prompts::{Prompt, PromptedPipeline, SampleSize, Words};

/// Names of the arguments.
const WORDS: Words = Words { pipeline: "--pipeline", size: "--size" };

/// Options of `fm-dist sample`; unset values are the run's own.
#[derive(Clone, Debug)]
pub struct SampleRequest {
    /// A run folder or one of its checkpoints; the pipeline's own model if unset.
    pub run: Option<PathBuf>,
    /// Files to write: `.png` and `.mp4` for what is seen, `.safetensors` for the numbers.
    pub out: Vec<PathBuf>,
    /// A safetensors file of conditions; the dataset's named ones if unset and there are no
    /// prompts.
    pub conditions: Option<PathBuf>,
    /// `[C, (F,) H, W]`; the given noise's or the dataset's if unset.
    pub shape: Option<Vec<i64>>,
    /// Prompts, in place of conditions.
    pub prompts: Vec<Prompt>,
    /// Folder of a published pipeline, which encodes prompts and decodes latents.
    pub pipeline: Option<PathBuf>,
    /// The prompt to be guided away from.
    pub negative: Option<String>,
    /// Size of the samples of prompts; as `shape` if unset.
    pub size: Option<SampleSize>,
    pub fps: Option<i64>,
    /// The program that writes videos; that in `PATH` if unset.
    pub ffmpeg: Option<PathBuf>,
    /// Overrides of the configuration of a pipeline's own model.
    pub overrides: Vec<String>,
    pub num_steps: Option<i64>,
    pub guidance_scale: Option<f64>,
    pub true_cfg_scale: Option<f64>,
    pub shift: Option<f64>,
    pub solver: Option<Solver>,
    /// Samples for each condition; one for each prompt, or row of a file, if unset.
    pub per_condition: Option<i64>,
    pub seed: Option<u64>,
    /// Factor of the run's own LoRA.
    pub lora_scale: f64,
    /// The weights as they are, or averaged.
    pub weights: SavedWeights,
    /// LoRAs from files that are added to the model.
    pub loras: Vec<AddedLora>,
}

impl Default for SampleRequest {
    /// Asks for nothing: no run, no file, and every option the run's own.
    fn default() -> Self {
        SampleRequest {
            run: None,
            out: Vec::new(),
            conditions: None,
            shape: None,
            prompts: Vec::new(),
            pipeline: None,
            negative: None,
            size: None,
            fps: None,
            ffmpeg: None,
            overrides: Vec::new(),
            num_steps: None,
            guidance_scale: None,
            true_cfg_scale: None,
            shift: None,
            solver: None,
            per_condition: None,
            seed: None,
            lora_scale: 1.0,
            weights: SavedWeights::Trained,
            loras: Vec::new(),
        }
    }
}

/// The model to generate with.
struct Source {
    /// The model's own, without this call's options.
    config: RunConfig,
    /// `None` for a pipeline's own model.
    checkpoint: Option<PathBuf>,
}

/// Generates from a run's newest checkpoint, from the given one or from a pipeline's own model, and
/// writes the files.
///
/// # Errors
/// [`Error::NoCheckpoint`], [`Error::CheckpointMismatch`], [`Error::Storage`]; before anything is
/// computed, [`Error::Data`] or [`Error::Config`] if prompts or conditions are missing, malformed
/// or do not fit the model, or a file could not be written.
pub fn sample(request: &SampleRequest) -> Result<()> {
    check_outputs(&request.out, &inputs(request))?;
    let source = source(request)?;
    let config = with_options(source.config.clone(), request);
    open_libraries(&config)?;
    // As in training, so that digits are those of its samples.
    tch::set_num_threads(config.parallel.num_threads);
    match request.prompts.is_empty() {
        true => by_conditions(request, &source, &config),
        false => by_prompts(request, &source, &config),
    }
}

fn inputs(request: &SampleRequest) -> Vec<Named<'_>> {
    request.conditions.iter().map(|path| Named { argument: "--conditions", path }).collect()
}

fn source(request: &SampleRequest) -> Result<Source> {
    if let Some(run) = &request.run {
        let (run, checkpoint) = locate(run)?;
        return Ok(Source { config: folder::config_of(&run)?, checkpoint: Some(checkpoint) });
    }
    let Some(pipeline) = &request.pipeline else {
        let what = "must be given, or --pipeline for the published model that is in it";
        return Err(Error::config("--run", what));
    };
    Ok(Source { config: pretrained_config(pipeline, &request.overrides)?, checkpoint: None })
}

/// Returns the configuration with the options of this call.
fn with_options(mut config: RunConfig, request: &SampleRequest) -> RunConfig {
    let sampling = &mut config.sampling;
    sampling.num_steps = request.num_steps.unwrap_or(sampling.num_steps);
    sampling.guidance_scale = request.guidance_scale.unwrap_or(sampling.guidance_scale);
    sampling.true_cfg_scale = request.true_cfg_scale.unwrap_or(sampling.true_cfg_scale);
    sampling.shift = request.shift.unwrap_or(sampling.shift);
    sampling.solver = request.solver.or(sampling.solver);
    sampling.fps = request.fps.unwrap_or(sampling.fps);
    sampling.negative_prompt = request.negative.clone().or(sampling.negative_prompt.take());
    let pipeline = request.pipeline.as_ref().map(|path| path.display().to_string());
    sampling.pipeline = pipeline.or(sampling.pipeline.take());
    if let Some(SampleSize { width, height, frames }) = request.size {
        sampling.size = [Some(width), Some(height), frames].into_iter().flatten().collect();
    }
    let is_dataset = request.conditions.is_none() && request.prompts.is_empty();
    let usual = if is_dataset { sampling.per_condition } else { 1 };
    sampling.per_condition = request.per_condition.unwrap_or(usual);
    config.seed = request.seed.unwrap_or(config.seed);
    config
}

fn by_conditions(request: &SampleRequest, source: &Source, config: &RunConfig) -> Result<()> {
    let origin = origin_of(request, config)?;
    let is_written = |path: &PathBuf| match format_of(path) {
        Some(Format::Picture) if !origin.is_of_pictures() => Err(Error::config(
            "--out",
            format!(
                "latents {:?} are no pictures, which have 1 or 3 channels; write them as .safetensors, or \
                 generate by --prompt, whose samples are decoded",
                origin.shape
            ),
        )),
        Some(Format::Video) => {
            let what = "samples of conditions are not decoded; write them as .safetensors";
            Err(Error::config("--out", what))
        }
        _ => Ok(()),
    };
    request.out.iter().try_for_each(is_written)?;
    let tokens = tokens_of_sample(config, &origin.shape, origin.text_tokens());
    let (loras, device) = opened(request, source, config, vec![tokens])?;
    let plan = Plan::new(config, &origin, Scheduler::of(config)?.as_ref(), device)?;
    plan.rehearse()?;
    let replica = replica(request, source, &loras, device)?;
    let samples = plan.generate(&replica, config.sampling.per_condition, &|| Ok(()))?;
    request.out.iter().try_for_each(|path| write_samples(&samples, path))
}

/// Text encoders, model and decoder are in memory one after the other.
fn by_prompts(request: &SampleRequest, source: &Source, config: &RunConfig) -> Result<()> {
    let usual = || usual_shape(request, config);
    let count = config.sampling.per_condition;
    let prompted = PromptedPipeline::open(config, &request.prompts, count, WORDS, usual)?;
    let shapes: Vec<&[i64]> = prompted.shapes().collect();
    let fps = frames_per_second(config, prompted.family());
    let ffmpeg = request.ffmpeg.as_deref();
    let files = Files::new(&request.out, &shapes, fps, ffmpeg, &inputs(request))?;
    prompted.check(config)?;
    let (loras, device) = opened(request, source, config, prompted.tokens(config))?;
    let prompted = prompted.on(device, config.model.dtype.kind());
    let origins = prompted.origins(config, &Solo)?;
    let latents = {
        let replica = replica(request, source, &loras, device)?;
        let latents = |origin: &Origin| {
            let plan = prompted.plan(config, origin, device)?;
            Ok(plan.generate(&replica, 1, &|| Ok(()))?.images)
        };
        origins.iter().map(latents).collect::<Result<Vec<_>>>()?
    };
    let sigmas = prompted.plan(config, &origins[0], device)?.sigmas();
    files.write_numbers(&latents, &sigmas)?;
    if files.are_decoded() {
        for (index, latents) in latents.iter().enumerate() {
            files.write(index, &prompted.frames(latents)?)?;
        }
    }
    Ok(())
}

/// Compares the added LoRAs with the model, and opens the device.
fn opened(
    request: &SampleRequest,
    source: &Source,
    config: &RunConfig,
    tokens: Vec<Tokens>,
) -> Result<(AddedLoras, Device)> {
    let of_model = &source.config;
    let loras = AddedLoras::open(&request.loras, &of_model.model.family, &of_model.stages()?)?;
    Ok((loras, device(config, || tokens, &Solo)?.without_log()))
}

fn replica(
    request: &SampleRequest,
    source: &Source,
    loras: &AddedLoras,
    device: Device,
) -> Result<Replica<'static>> {
    let config = &source.config;
    let replica = match &source.checkpoint {
        Some(folder) => {
            trained_replica(config, folder, request.weights, device, request.lora_scale)?
        }
        None => frozen_replica(config, device)?,
    };
    loras.added_to(replica, config.model.dtype.kind(), device)
}

/// Returns the shape of the data's latents.
fn usual_shape(request: &SampleRequest, config: &RunConfig) -> Result<Vec<i64>> {
    if request.run.is_none() {
        let what = "must be given: without --run there are no data whose size samples could have";
        return Err(Error::config("--size", what));
    }
    let dataset = dataset(config).map_err(|error| {
        let what = format!("must be given: the run's dataset cannot tell it ({error})");
        Error::config("--size", what)
    })?;
    Ok(dataset.latent_shape(dataset.sampled_group()))
}

fn origin_of(request: &SampleRequest, config: &RunConfig) -> Result<Origin> {
    let shape = request.shape.as_deref();
    let Some(path) = &request.conditions else {
        let dataset = dataset(config)?;
        let conditions = dataset.conditions()?.ok_or_else(|| {
            let what = "names no conditions to generate from; give a --prompt, or some with --conditions FILE.safetensors";
            Error::data(dataset.path(), what)
        })?;
        return Ok(Origin::from_dataset(&dataset, conditions, shape));
    };
    let origin = Origin::from_file(path, shape, || dataset(config))?;
    if origin.has_noise() && config.sampling.per_condition != 1 {
        let what = format!(
            "{} would be equal: {} holds the `noise` to start from",
            config.sampling.per_condition,
            path.display()
        );
        return Err(Error::config("--per-condition", what));
    }
    Ok(origin)
}
