//! The table of `fm-dist check` over many world sizes on a cluster: one line for each prediction.

use crate::config::{MicroBatches, RunConfig};
use crate::error::Result;
use crate::nn::Tokens;
use crate::parallel::Offload;
use crate::plan::between::{between_products, taken_kernels};
use crate::plan::{Cluster, KNOWN_NAME, Prediction, StageWork, Workload};
use crate::plan::{ForwardWork, forward_work};

/// Options of the predictions.
#[derive(Clone, Debug)]
pub struct ScalingRequest {
    pub cluster: Cluster,
    /// World sizes, ascending. The number of micro-batches at the first one is used for all.
    pub world_sizes: Vec<usize>,
}

/// Returns lines of a plan, name and value. Each rank does the same work at every world size (weak
/// scaling).
///
/// # Errors
/// [`Error::Config`](crate::error::Error::Config) if the first world size does not divide the
/// global batch, or if one does not fill its nodes.
pub fn scaling(
    config: &RunConfig,
    tokens: Tokens,
    request: &ScalingRequest,
) -> Result<Vec<(String, String)>> {
    let ScalingRequest { cluster, world_sizes } = request;
    world_sizes.iter().try_for_each(|ranks| cluster.check_world(*ranks))?;
    let micro = config.micro_batches(tokens, world_sizes[0])?;
    let work = workload(config, tokens, micro)?;
    let alone = work.predict(cluster, 1);
    let mut lines = vec![
        (format!("predicted for {}", cluster.name), cluster.about().into()),
        ("  ranks".into(), in_columns(COLUMNS.map(String::from))),
    ];
    for &ranks in world_sizes {
        let predicted =
            row(work.predict(cluster, ranks), alone, ranks * micro.count * micro.samples);
        lines.push((format!("  {ranks}"), in_columns(predicted)));
    }
    lines.extend(explanations(config, micro, request));
    Ok(lines)
}

const COLUMNS: [&str; 8] = [
    "global batch",
    "step s",
    "compute",
    "optimizer",
    "communication",
    "exposed",
    "efficiency",
    "samples/s",
];

/// Lines below the table: the terms of the prediction, and what it leaves out.
fn explanations(
    config: &RunConfig,
    MicroBatches { count, samples }: MicroBatches,
    request: &ScalingRequest,
) -> [(String, String); 4] {
    let ScalingRequest { cluster, world_sizes } = request;
    let batch = match config.train.global_batch_size {
        Some(global) => format!(
            "; train.global_batch_size = {global} holds at {} ranks and grows with them",
            world_sizes[0]
        ),
        None => String::new(),
    };
    let offload = if config.parallel.offload == Offload::NONE { "" } else { ", offloading" };
    let packed = if config.model.frozen_form().is_some() { ", packed weights" } else { "" };
    let measured = if cluster.is_asynchronous() {
        "no GPU has been measured against it"
    } else {
        "tests/bench/scaling.sh measures steps beside it"
    };
    let line = |name: &str, text: String| (format!("  {name}"), text);
    [
        line(
            "weak scaling",
            format!(
                "{count} micro-batches of {samples} samples a rank at every number of ranks{batch}"
            ),
        ),
        line(
            "seconds",
            "step = compute + optimizer + exposed communication; \
             efficiency: a step of 1 rank, which holds all optimizer state, over it"
                .into(),
        ),
        line(
            "not known",
            format!(
                "congestion, stragglers, data, checkpoints{offload}{packed} are not in it; {measured}"
            ),
        ),
        line("constants", format!("with their sources in {KNOWN_NAME}; --clusters takes others")),
    ]
}

fn workload(config: &RunConfig, tokens: Tokens, micro: MicroBatches) -> Result<Workload> {
    let (kind, parallel) = (config.model.dtype.kind(), &config.parallel);
    let kernels = taken_kernels(config);
    let stage = |work: ForwardWork| {
        let [forward, backward] = between_products(&work, kernels, kind);
        StageWork {
            parameters: work.parameters,
            trained: work.trained,
            product_flop: work.product_flop,
            trained_flop: work.trained_flop,
            attention_flop: work.attention_flop,
            forward,
            backward,
        }
    };
    let work = forward_work(&config.stages()?, tokens, micro.samples as i64, kind);
    Ok(Workload {
        stages: work.into_iter().map(stage).collect(),
        kind,
        kernels,
        micro_batches: micro.count,
        sharding: parallel.sharding,
        sharding_group: parallel.sharding_group,
        recompute: parallel.recompute,
        reduce_dtype: parallel.reduce_dtype,
        average_bytes: config.ema.bytes(),
        num_threads: parallel.num_threads as usize,
    })
}

fn row(predicted: Prediction, alone: Prediction, global_batch: usize) -> [String; 8] {
    let Prediction { step_seconds, compute_seconds, optimizer_seconds, spent } = predicted;
    let seconds = [
        step_seconds,
        compute_seconds,
        optimizer_seconds,
        spent.communication_seconds,
        spent.exposed_seconds,
    ]
    .map(shown);
    let [step, compute, optimizer, communication, exposed] = seconds;
    let efficiency = format!("{:.1} %", 100.0 * alone.step_seconds / step_seconds);
    let rate = format!("{:.1}", global_batch as f64 / step_seconds);
    [global_batch.to_string(), step, compute, optimizer, communication, exposed, efficiency, rate]
}

/// Formats a number with four digits, the first of which is not zero.
fn shown(seconds: f64) -> String {
    let digits =
        if seconds > 0.0 { (3.0 - seconds.log10().floor()).clamp(0.0, 6.0) as usize } else { 0 };
    format!("{seconds:.digits$}")
}

fn in_columns(cells: [String; 8]) -> String {
    const WIDTHS: [usize; 8] = [12, 9, 9, 9, 13, 9, 10, 10];
    cells
        .iter()
        .zip(WIDTHS)
        .map(|(cell, width)| format!("{cell:>width$}"))
        .collect::<Vec<_>>()
        .join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_have_four_digits_that_say_something() {
        let texts = [0.0, 0.000_012_34, 0.012_344, 1.234_4, 12.344, 1234.4, 123_444.0].map(shown);
        assert_eq!(texts, ["0", "0.000012", "0.01234", "1.234", "12.34", "1234", "123444"]);
    }
}
