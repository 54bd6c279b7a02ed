//! A model on one rank: its stages, and the part of their parameters that this rank holds.

use tch::{Device, Kind, Tensor, no_grad};

use crate::error::Result;
use crate::nn::{Activations, ParamInfo, Stage};
use crate::parallel::ahead::Ahead;
use crate::parallel::tape::run;
use crate::parallel::{Bucket, Copies, Recompute, Sharing, Tape};
use crate::pulse;
use crate::rng::Key;

/// The devices of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    /// Computes; holds the compute copy of the parameters.
    pub compute: Device,
    /// Holds, between steps, the optimizer's state and the master weights that do not share storage
    /// with the compute copy.
    pub home: Device,
    /// True if frozen parameters lie in host memory, and are copied to the compute device for each
    /// use.
    pub streams_frozen: bool,
}

impl Devices {
    /// One device for everything.
    pub fn one(device: Device) -> Self {
        Devices { compute: device, home: device, streams_frozen: false }
    }
}

/// Stages with a bucket each, shared with other ranks or not.
pub struct Replica<'c> {
    pub stages: Vec<Box<dyn Stage>>,
    pub buckets: Vec<Bucket>,
    pub sharing: Sharing<'c>,
    /// Brings what lies in host memory.
    pub copies: Copies,
}

impl Replica<'static> {
    /// A model that one rank holds alone. Its parameters are initialized from `key`; without one
    /// they are zeros, to be loaded next.
    pub fn alone(
        stages: Vec<Box<dyn Stage>>,
        kind: Kind,
        device: Device,
        key: Option<Key>,
    ) -> Self {
        Replica::shared(stages, kind, Devices::one(device), key, Sharing::alone())
    }
}

impl<'c> Replica<'c> {
    /// This rank's part of a shared model; the model is the same on every rank for the same `key`.
    pub fn shared(
        stages: Vec<Box<dyn Stage>>,
        kind: Kind,
        devices: Devices,
        key: Option<Key>,
        sharing: Sharing<'c>,
    ) -> Self {
        pulse::name_stages(stages.iter().map(|stage| stage.params().stage().into()).collect());
        let buckets = stages
            .iter()
            .map(|stage| Bucket::new(stage.params(), kind, devices, key, &sharing))
            .collect();
        Replica { stages, buckets, sharing, copies: Copies::to(devices.compute) }
    }

    /// Every parameter in order, stage by stage.
    pub fn infos(&self) -> impl Iterator<Item = &ParamInfo> {
        self.stages.iter().flat_map(|stage| stage.params().infos())
    }

    pub fn num_parameters(&self) -> i64 {
        self.stages.iter().map(|stage| stage.params().numel()).sum()
    }

    /// The number of parameters that are trained.
    pub fn num_trained(&self) -> i64 {
        self.stages.iter().map(|stage| stage.params().num_trained()).sum()
    }

    /// True if some parameters are frozen.
    pub fn has_frozen(&self) -> bool {
        self.buckets.iter().any(Bucket::has_frozen)
    }

    /// Returns a stage's parameters, `[P]` f32.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn parameters(&self, stage: usize) -> Result<Tensor> {
        self.buckets[stage].parameters(&self.sharing)
    }

    /// Returns a stage's trained parameters, one after another, f32.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn trained_parameters(&self, stage: usize) -> Result<Tensor> {
        self.buckets[stage].trained_parameters(&self.sharing)
    }

    /// Starts a forward that can be followed by a backward.
    pub fn tape(&self, recompute: Recompute) -> Tape<'_> {
        Tape::new(self, recompute)
    }

    /// Leaves the other ranks after an error, without waiting for those that are gone.
    pub fn abandon_peers(&mut self) {
        std::mem::replace(&mut self.sharing, Sharing::alone()).abandon();
    }

    /// Runs the model without graphs and returns its outputs.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn infer(&self, input: Activations) -> Result<Activations> {
        let mut weights = Ahead::new(self, 0..self.stages.len());
        let output = no_grad(|| {
            self.stages.iter().enumerate().try_fold(input, |input, (index, stage)| {
                Ok(run(index, stage.as_ref(), &weights.next()?, &input))
            })
        });
        pulse::leave_stages();
        output
    }

    /// After an update, sends this rank's updated shards to the ranks that hold full parameters,
    /// and receives theirs.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn publish(&self) -> Result<()> {
        let works = self
            .buckets
            .iter()
            .map(|bucket| bucket.publish(self.sharing.shards()))
            .collect::<Result<Vec<_>>>()?;
        works.into_iter().try_for_each(|work| work.wait())
    }
}
