//! `fm-dist check`: what a configuration would do, without doing it.

use std::fmt::Write;

use super::check_data;
use crate::config::RunConfig;
use crate::data::{Dataset, Order};
use crate::error::Result;

/// The plan of a run on `world_size` ranks as text. Opens the data's headers; allocates no model.
///
/// # Errors
/// Whatever would stop the run at its start: [`Error::Config`](crate::error::Error::Config), [`Error::Data`](crate::error::Error::Data).
pub fn check(config: &RunConfig, world_size: usize) -> Result<String> {
    let micro_batches = config.micro_batches(world_size)?;
    let global_batch = micro_batches * config.data.micro_batch_size_per_gpu * world_size;
    let stages = config.model.family.stages()?;
    let parameters: i64 = stages.iter().map(|stage| stage.params().numel()).sum();
    let largest = stages.iter().map(|stage| stage.params().numel()).max().unwrap_or(0);
    let dataset = Dataset::named(&config.data.path)?;
    check_data(config, &dataset)?;
    let order = Order::new(dataset.groups(), global_batch, config.seed)?;
    let state_tensors = config.optimizer.state_names().len() as i64;
    let leaf_bytes = match config.model.dtype.kind() {
        tch::Kind::Float => 0, // the leaf is the master
        kind => kind.elt_size_in_bytes() as i64,
    };
    let bytes = parameters * (4 + leaf_bytes + 4 + 4 * state_tensors);
    let trained = stages.iter().filter(|stage| stage.params().numel() > 0).count();
    let mut text = String::new();
    let mut line = |name: &str, value: String| writeln!(text, "{name:<22} {value}").expect("writing to a String");
    line("model", format!("{parameters} parameters in {} stages, the largest {largest}", stages.len()));
    line("bytes a rank", format!("{:.1} MiB for weights, gradients and optimizer state, activations apart", bytes as f64 / 1048576.0));
    line("data", format!("{}: {} samples; resolution groups: {}", dataset.manifest().name, dataset.num_samples(), dataset.groups().len()));
    line(
        "global batch",
        format!("{global_batch} = {} samples x {world_size} ranks x {micro_batches} micro-batches", config.data.micro_batch_size_per_gpu),
    );
    line("epoch", format!("{} steps, {} samples left out of each", order.batches_per_epoch(), order.left_out_per_epoch()));
    line("run", format!("{} steps, {:.1} epochs", config.max_steps, config.max_steps as f64 / order.batches_per_epoch() as f64));
    line("collectives a step", format!("{trained} all-reduces of gradients, 1 all-gather of statistics"));
    Ok(text)
}
