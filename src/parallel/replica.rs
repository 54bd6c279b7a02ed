//! A whole model on one rank: its stages and their parameters.

use tch::{Device, Kind, no_grad};

use super::tape::run;
use super::{Bucket, Recompute, Tape};
use crate::nn::{Activations, ParamInfo, Stage};
use crate::rng::Key;

/// Stages with a bucket each.
pub struct Replica {
    pub stages: Vec<Box<dyn Stage>>,
    pub buckets: Vec<Bucket>,
}

impl Replica {
    /// Parameters begun from `key`, the same on every rank; zeros without one, where they are loaded next.
    pub fn new(stages: Vec<Box<dyn Stage>>, kind: Kind, device: Device, key: Option<Key>) -> Self {
        let buckets = stages.iter().map(|stage| Bucket::new(stage.params(), kind, device, key)).collect();
        Replica { stages, buckets }
    }

    /// Every parameter in order, stage by stage.
    pub fn infos(&self) -> impl Iterator<Item = &ParamInfo> {
        self.stages.iter().flat_map(|stage| stage.params().infos())
    }

    pub fn num_parameters(&self) -> i64 {
        self.stages.iter().map(|stage| stage.params().numel()).sum()
    }

    /// A forward that can be followed by a backward.
    pub fn tape(&self, recompute: Recompute) -> Tape<'_> {
        Tape::new(&self.stages, &self.buckets, recompute)
    }

    /// The model's outputs alone, without graphs.
    pub fn infer(&self, input: Activations) -> Activations {
        no_grad(|| self.stages.iter().zip(&self.buckets).fold(input, |input, (stage, bucket)| run(stage.as_ref(), bucket, &input)))
    }
}
