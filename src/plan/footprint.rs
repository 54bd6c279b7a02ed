//! Estimates the memory that a forward keeps for its backward, from the rows that each matrix reads
//! and writes.

use tch::Kind;

use crate::nn::{LowRank, ParamInfo, ParamSet, Stage, Tokens};
use crate::parallel::{Offload, Recompute};

/// Bytes that one micro-batch keeps for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Every stage's graph.
    pub graphs: u64,
    /// The largest stage's graph.
    pub largest_graph: u64,
    /// The input of every stage that a gradient reaches.
    pub boundaries: u64,
    /// The input of one stage.
    pub boundary: u64,
}

impl Footprint {
    /// Returns the bytes on the device. A recomputed stage keeps its input, on the host where
    /// activations are offloaded, and needs its graph while it is computed again.
    pub fn on_device(&self, recompute: Recompute, offload: Offload) -> u64 {
        let inputs = if offload.activations {
            // One is used while the next one comes back.
            self.boundaries.min(2 * self.boundary)
        } else {
            self.boundaries
        };
        let recomputed = inputs + self.largest_graph;
        match recompute {
            Recompute::Never => self.graphs,
            Recompute::Always => recomputed,
            Recompute::Every(count) => {
                self.graphs - self.graphs.saturating_sub(recomputed) / count as u64
            }
        }
    }

    /// Returns the bytes on the host.
    pub fn on_host(&self, recompute: Recompute, offload: Offload) -> u64 {
        match recompute {
            _ if !offload.activations => 0,
            Recompute::Never => 0,
            Recompute::Always => self.boundaries,
            Recompute::Every(count) => self.boundaries / count as u64,
        }
    }
}

/// Factor for what attention, norms and gates keep besides the matrices' inputs and outputs.
///
/// Measured on a CPU: peak memory with every graph kept minus that with recomputation, over the
/// same difference of these estimates without the factor: FLUX of 71M parameters 1.14 in f32 and
/// 1.47 in bfloat16, Wan of 53M 1.49 and 1.82; more in bfloat16 because norms and rotations keep
/// f32. The mean of both families is off by 15 % for each.
fn beside_matrices(kind: Kind) -> f64 {
    if kind == Kind::Float { 1.3 } else { 1.65 }
}

/// Estimates the footprint of `samples` samples of `tokens` each in a model of `width`, computed in
/// `kind`.
pub fn footprint(
    stages: &[Box<dyn Stage>],
    width: i64,
    tokens: Tokens,
    samples: i64,
    kind: Kind,
) -> Footprint {
    // Nothing is kept before the first stage with a gradient.
    let first = stages.iter().position(|stage| stage.params().num_trained() > 0);
    let kept = |index: usize| match first {
        Some(first) if index >= first => kept_bytes(stages[index].params(), tokens, samples, kind),
        _ => 0.0,
    };
    let graphs = (0..stages.len()).map(kept).collect::<Vec<_>>();
    let elements = samples * (tokens.image + tokens.text) * width;
    let boundary = elements as u64 * kind.elt_size_in_bytes() as u64;
    Footprint {
        graphs: graphs.iter().sum::<f64>() as u64,
        largest_graph: graphs.iter().copied().fold(0.0, f64::max) as u64,
        boundaries: boundary * (graphs.len() - first.unwrap_or(graphs.len())) as u64,
        boundary,
    }
}

/// Estimates the bytes that a forward takes which no backward follows: at most what its largest
/// stage would keep, and what goes into a stage and comes out of it.
pub fn forward_bytes(
    stages: &[Box<dyn Stage>],
    width: i64,
    tokens: Tokens,
    samples: i64,
    kind: Kind,
) -> u64 {
    let kept = stages.iter().map(|stage| kept_bytes(stage.params(), tokens, samples, kind));
    let largest = kept.fold(0.0, f64::max) as u64;
    largest + 2 * footprint(stages, width, tokens, samples, kind).boundary
}

/// Returns the bytes that a stage's graph keeps: what its matrices read and write, and what is kept
/// beside them. A frozen matrix needs no input in the backward pass.
pub(super) fn kept_bytes(params: &ParamSet, tokens: Tokens, samples: i64, kind: Kind) -> f64 {
    let names = |change: &LowRank| [change.weight_name(params), change.names(params).0];
    let changed: Vec<[&str; 2]> = params.low_ranks().iter().map(names).collect();
    let rows = |info: &ParamInfo| (samples * tokens.rows(info.rows)) as f64;
    let mut beside = 0.0;
    for info in matrices(params) {
        let name = info.name.as_str();
        if info.frozen && !changed.iter().any(|[weight, _]| *weight == name) {
            beside -= rows(info) * (info.numel() / info.shape[0]) as f64;
        }
        if changed.iter().any(|[_, down]| *down == name) {
            beside += rows(info) * info.shape[0] as f64;
        }
    }
    let passed = passed_bytes(params, tokens, samples, kind);
    passed * beside_matrices(kind) + beside * kind.elt_size_in_bytes() as f64
}

/// Returns the bytes that the matrices of a stage read and write, their own aside.
pub(super) fn passed_bytes(params: &ParamSet, tokens: Tokens, samples: i64, kind: Kind) -> f64 {
    let passed = |info: &ParamInfo| {
        let features = info.shape[0] + info.numel() / info.shape[0];
        (samples * tokens.rows(info.rows) * features) as f64
    };
    let own = matrices(params).filter(|info| !info.added);
    own.map(passed).sum::<f64>() * kind.elt_size_in_bytes() as f64
}

fn matrices(params: &ParamSet) -> impl Iterator<Item = &ParamInfo> {
    params.infos().iter().filter(|info| info.is_matrix())
}
