//! Plans of a validation: its samples, its noise levels, its memory, and how long it takes beside
//! the steps.

use tch::Kind;

use crate::assembly::attention::tokens_of_group;
use crate::assembly::validation::ValidationSet;
use crate::config::RunConfig;
use crate::data::Dataset;
use crate::error::Result;
use crate::flow::Note;
use crate::nn::{Stage, Tokens};
use crate::parallel::{Recompute, Sharding};
use crate::plan::check::shown;
use crate::plan::data::check_data;
use crate::plan::footprint::forward_bytes;
use crate::plan::{ForwardWork, RankMemory, forward_work};

/// Refuses validation data that the adapter or the model cannot take. Returns notes that are worth
/// knowing though nothing is wrong.
///
/// # Errors
/// As [`check_data`].
pub fn check_validation(
    config: &RunConfig,
    set: &ValidationSet,
    trained: &Dataset,
) -> Result<Vec<Note>> {
    // What is held out has passed with the data that it is held out of.
    let of_own = match config.validation.path {
        Some(_) => check_data(config, &set.dataset)?,
        None => Vec::new(),
    };
    let own = |note: Note| match note {
        Note::Warning(text) => Note::Warning(format!("validation: {text}")),
        Note::Information(text) => Note::Information(format!("validation: {text}")),
    };
    Ok(of_own.into_iter().map(own).chain(set.notes(config, trained)).collect())
}

/// Describes what a run is judged on: `183 of 1797 samples (share 0.1), at 9 sigmas 0.10 to 0.90,
/// every 500 steps`.
pub fn judged_text(config: &RunConfig, set: &ValidationSet) -> String {
    let validation = &config.validation;
    let (samples, all) = (set.num_samples(), set.dataset.num_samples());
    let from = match (&validation.path, validation.share) {
        (Some(path), _) => format!("of {path}"),
        (None, Some(share)) => {
            let held_out = set.dataset.num_held_out();
            format!("of {held_out} held out of {all} (share {share})")
        }
        (None, None) => String::new(),
    };
    let (labels, word) = (set.levels.labels(), set.levels.word());
    let levels = match &labels[..] {
        [only] => format!("{word} {only}"),
        [first, .., last] => format!("{} {word}s {first} to {last}", labels.len()),
        [] => String::new(),
    };
    format!("{samples} samples {from}, at {levels}, every {} steps", validation.every_n_steps)
}

/// Returns lines about a validation, name and value. `memory`: that of a step.
///
/// # Errors
/// As [`RunConfig::global_batch`].
pub(super) fn plan_validation(
    config: &RunConfig,
    stages: &[Box<dyn Stage>],
    set: &ValidationSet,
    memory: &RankMemory,
    world_size: usize,
) -> Result<Vec<(&'static str, String)>> {
    let (blocks, rounds) = (set.blocks.len(), set.rounds(world_size));
    let passes = set.levels.values().len() + 1;
    let steps = steps_of(config, stages, set, world_size)?;
    let share = 100.0 * steps / (steps + config.validation.every_n_steps as f64);
    let bytes = bytes(config, stages, set, memory, world_size);
    let step = memory.on_device(&config.parallel, world_size as u64);
    let more = if bytes > step { ", more than a step" } else { "" };
    Ok(vec![
        ("validation", judged_text(config, set)),
        (
            "  each",
            format!(
                "{rounds} of {blocks} blocks a rank x {passes} forwards: about as long as {steps:.1} steps, \
                 {share:.1} % of the time"
            ),
        ),
        ("  its memory", format!("{} a rank{more}; it has no gradients", shown(bytes))),
    ])
}

/// Estimates how many steps take as long as a validation, from the operations of both.
fn steps_of(
    config: &RunConfig,
    stages: &[Box<dyn Stage>],
    set: &ValidationSet,
    world_size: usize,
) -> Result<f64> {
    let tokens =
        samples_of(config, set).first().map_or(Tokens { image: 1, text: 0 }, |(tokens, _)| *tokens);
    let work = forward_work(stages, tokens, 1, Kind::Float);
    let forwards_of_sample = forwards_of_step(config, &work);
    // In its last round some ranks repeat a block.
    let filled = (set.rounds(world_size) * world_size) as f64 / set.blocks.len() as f64;
    let passes = (set.levels.values().len() + 1) as f64;
    let forwards = set.num_samples() as f64 * filled * passes;
    Ok(forwards / (config.global_batch(world_size)? as f64 * forwards_of_sample))
}

/// Returns how many forwards of a sample take as long as it takes in a step, where the forward has
/// this work.
pub(super) fn forwards_of_step(config: &RunConfig, work: &[ForwardWork]) -> f64 {
    let sum = |of: fn(&ForwardWork) -> f64| work.iter().map(of).sum::<f64>();
    let (products, attention) = (sum(|work| work.product_flop), sum(|work| work.attention_flop));
    let backward = products + sum(|work| work.trained_flop) + 2.0 * attention;
    let again = match config.parallel.recompute {
        _ if config.parallel.sharding == Sharding::Parameters => 1.0,
        Recompute::Never => 0.0,
        Recompute::Always => 1.0,
        Recompute::Every(count) => 1.0 / count as f64,
    };
    1.0 + again + backward / (products + attention).max(1.0)
}

/// Returns the tokens of a sample of each block, and the block's number of samples.
fn samples_of(config: &RunConfig, set: &ValidationSet) -> Vec<(Tokens, usize)> {
    let groups = set.dataset.groups();
    let of_block = set.blocks.iter().map(|block| (block.group, block.ids.len()));
    let mut kinds: Vec<(usize, usize)> = of_block.collect();
    kinds.dedup();
    let tokens = |group: usize| tokens_of_group(config, &set.dataset, &groups[group]);
    kinds.into_iter().map(|(group, samples)| (tokens(group), samples)).collect()
}

fn bytes(
    config: &RunConfig,
    stages: &[Box<dyn Stage>],
    set: &ValidationSet,
    memory: &RankMemory,
    world_size: usize,
) -> u64 {
    let (width, kind) = (config.model.family.width(), config.model.dtype.kind());
    let forward = samples_of(config, set)
        .into_iter()
        .map(|(tokens, samples)| forward_bytes(stages, width, tokens, samples as i64, kind));
    memory.judging(&config.parallel, world_size as u64, forward.max().unwrap_or(0))
}
