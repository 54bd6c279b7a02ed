//! Estimates the memory that a forward keeps for its backward, from the rows that each matrix reads
//! and writes.

use tch::Kind;

use crate::nn::{ParamInfo, ParamSet, Stage, Tokens};
use crate::parallel::{Offload, Recompute};

/// Bytes that one micro-batch keeps for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Every stage's graph.
    pub graphs: u64,
    /// The largest stage's graph.
    pub largest_graph: u64,
    /// The input of every stage.
    pub boundaries: u64,
    /// The input of one stage.
    pub boundary: u64,
}

impl Footprint {
    /// Returns the bytes on the device. A recomputed stage keeps its input, on the host where
    /// activations are offloaded, and needs its graph while it is computed again.
    pub fn on_device(&self, recompute: Recompute, offload: Offload) -> u64 {
        let inputs = if offload.activations() {
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
            _ if !offload.activations() => 0,
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
pub(super) fn beside_matrices(kind: Kind) -> f64 {
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
    let bytes = kind.elt_size_in_bytes() as f64 * beside_matrices(kind);
    let graphs = stages
        .iter()
        .map(|stage| graph_elements(stage.params(), tokens, samples) * bytes)
        .collect::<Vec<_>>();
    let elements = samples * (tokens.image + tokens.text) * width;
    let boundary = elements as u64 * kind.elt_size_in_bytes() as u64;
    Footprint {
        graphs: graphs.iter().sum::<f64>() as u64,
        largest_graph: graphs.iter().copied().fold(0.0, f64::max) as u64,
        boundaries: boundary * graphs.len() as u64,
        boundary,
    }
}

/// Returns the number of elements that a stage's matrices read and write.
pub(super) fn graph_elements(params: &ParamSet, tokens: Tokens, samples: i64) -> f64 {
    let matrices = params.infos().iter().filter(|info| info.shape.len() > 1);
    let elements = |info: &ParamInfo| {
        let (outputs, inputs) = (info.shape[0], info.numel() / info.shape[0]);
        (samples * tokens.rows(info.rows) * (inputs + outputs)) as f64
    };
    matrices.map(elements).sum::<f64>()
}
