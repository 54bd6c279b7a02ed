//! Plans of the samples that a run makes of its prompts: what they are, how long they take beside
//! the steps, and their memory.

use std::fs;
use std::path::Path;

use tch::Kind;

use crate::config::RunConfig;
use crate::data::Dataset;
use crate::error::Result;
use crate::flow::Guidance;
use crate::nn::{Stage, Tokens};
use crate::plan::check::shown;
use crate::plan::footprint::forward_bytes;
use crate::plan::validation::forwards_of_step;
use crate::plan::{RankMemory, forward_work};
use crate::sample::prompts::PromptedPipeline;

/// Ending of the files whose sizes count.
const WEIGHTS: &str = "safetensors";

/// Returns lines about the samples of prompts, name and value; none without prompts. `memory`: that
/// of a step. Refuses prompts and pipelines with which a run would not start.
///
/// # Errors
/// As [`PromptedPipeline::of_run`] and [`RunConfig::global_batch`].
pub(super) fn plan_sampling(
    config: &RunConfig,
    stages: &[Box<dyn Stage>],
    dataset: &Dataset,
    memory: &RankMemory,
    world_size: usize,
) -> Result<Vec<(&'static str, String)>> {
    let Some(prompted) = PromptedPipeline::of_run(config, dataset)? else { return Ok(Vec::new()) };
    let sampling = &config.sampling;
    let (count, steps) = (prompted.len(), sampling.num_steps);
    let rounds = count.div_ceil(world_size);
    let passes = passes(config);
    let tokens: Vec<Tokens> = prompted.tokens(config);
    let as_steps = steps_of(config, stages, &tokens, rounds as f64, passes, world_size)?;
    let share = 100.0 * as_steps / (as_steps + sampling.every_n_steps as f64);
    let shape: Vec<String> =
        prompted.shapes().next().into_iter().flatten().map(i64::to_string).collect();
    let mut lines = vec![
        (
            "samples",
            format!(
                "{count} prompts of {} latents, every {} steps",
                shape.join(" x "),
                sampling.every_n_steps
            ),
        ),
        (
            "  each",
            format!(
                "{rounds} a rank x {steps} steps x {passes} forwards: about as long as {as_steps:.1} steps, \
                 {share:.1} % of the time, without decoding"
            ),
        ),
        ("  its memory", memory_text(config, stages, &tokens, memory, world_size)),
    ];
    let parts = prompted.family().parts;
    if let Some(folder) = sampling.pipeline.as_deref().filter(|_| !parts.is_empty()) {
        lines.push(("  the pipeline", pipeline_text(Path::new(folder), parts)));
    }
    Ok(lines)
}

/// Returns the forwards of the model at each step from noise to data.
fn passes(config: &RunConfig) -> i64 {
    let embeds = config.model.family.embeds_guidance();
    let guidance = config.flow_matching.adapter.build().guidance(embeds);
    let scale = match guidance {
        Guidance::Embedded => config.sampling.true_cfg_scale,
        _ => config.sampling.guidance_scale,
    };
    if matches!(scale, 0.0 | 1.0) { 1 } else { 2 }
}

/// Estimates how many steps take as long as the samples, from the operations of both.
fn steps_of(
    config: &RunConfig,
    stages: &[Box<dyn Stage>],
    tokens: &[Tokens],
    rounds: f64,
    passes: i64,
    world_size: usize,
) -> Result<f64> {
    let work = forward_work(stages, tokens[0], 1, Kind::Float);
    let forwards = rounds * (config.sampling.num_steps * passes) as f64;
    let of_rank = config.global_batch(world_size)? as f64 / world_size as f64;
    Ok(forwards / (of_rank * forwards_of_step(config, &work)))
}

fn memory_text(
    config: &RunConfig,
    stages: &[Box<dyn Stage>],
    tokens: &[Tokens],
    memory: &RankMemory,
    world_size: usize,
) -> String {
    let (width, kind) = (config.model.family.width(), config.model.dtype.kind());
    let forward = tokens.iter().map(|tokens| forward_bytes(stages, width, *tokens, 1, kind));
    let forward = forward.max().unwrap_or(0);
    let bytes = memory.judging(&config.parallel, world_size as u64, forward);
    let more = match bytes > memory.on_device(&config.parallel, world_size as u64) {
        true => ", more than a step",
        false => "",
    };
    format!("{} a rank{more}; it has no gradients", shown(bytes))
}

/// `vae 0.31 GiB after the samples on each rank; text_encoder 9.12 GiB before the model is there,
/// on rank 0`.
fn pipeline_text(folder: &Path, parts: &[&str]) -> String {
    let sizes = parts.iter().map(|part| (*part, weight_bytes(&folder.join(part))));
    let (decoder, others): (Vec<_>, Vec<_>) =
        sizes.filter(|(_, bytes)| *bytes > 0).partition(|(part, _)| *part == "vae");
    let told = |sizes: &[(&str, u64)]| {
        let told: Vec<String> =
            sizes.iter().map(|(part, bytes)| format!("{part} {}", shown(*bytes))).collect();
        told.join(", ")
    };
    format!(
        "its files: {} beside the model while samples are decoded, on each rank; {} before the model \
         is there, on rank 0",
        told(&decoder),
        told(&others)
    )
}

/// Returns the bytes of the weights in a folder.
fn weight_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let weights = entries.filter(|entry| entry.path().extension().is_some_and(|e| e == WEIGHTS));
    weights.filter_map(|entry| entry.path().metadata().ok()).map(|found| found.len()).sum()
}
