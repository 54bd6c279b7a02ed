//! This rank's shards of the averaged weights.

use tch::{Tensor, no_grad};

use crate::error::Result;
use crate::optim::EmaSettings;
use crate::parallel::{Bucket, Devices, Replica};

/// The exponential moving averages of the trained weights.
pub struct Averages {
    settings: EmaSettings,
    /// Number of the update after which the average began: 0, or where a resume turned it on.
    pub began: u64,
    /// One tensor for each trained piece of each stage.
    stages: Vec<Vec<Tensor>>,
}

impl Averages {
    /// Returns averages that begin as the present weights, before the first update.
    pub fn fresh(settings: &EmaSettings, replica: &Replica<'_>, devices: Devices) -> Self {
        let kind = settings.dtype.kind();
        let empty = |master: &Tensor| Tensor::empty(master.size(), (kind, devices.home));
        let of_bucket =
            |bucket: &Bucket| bucket.trained().map(|piece| empty(piece.values())).collect();
        let mut averages = Averages {
            settings: settings.clone(),
            began: 0,
            stages: replica.buckets.iter().map(of_bucket).collect(),
        };
        averages.begin(replica, 0);
        averages
    }

    /// Begins anew as the present weights, which `update` updates have made.
    pub fn begin(&mut self, replica: &Replica<'_>, update: u64) {
        self.began = update;
        for (averages, bucket) in self.stages.iter_mut().zip(&replica.buckets) {
            for (average, piece) in averages.iter_mut().zip(bucket.trained()) {
                no_grad(|| average.copy_(piece.values()));
            }
        }
    }

    /// This rank's shards of a stage's averages, one for each trained piece.
    pub fn of_stage(&self, stage: usize) -> &[Tensor] {
        &self.stages[stage]
    }

    /// Returns a stage's whole averages, one trained parameter after another: f32.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn whole(&self, stage: usize, replica: &Replica<'_>) -> Result<Tensor> {
        replica.buckets[stage].whole(&self.stages[stage], &replica.sharing)
    }

    /// Copies this rank's shards out of a stage's whole averages.
    pub fn set(&mut self, stage: usize, flat: &Tensor, bucket: &Bucket) {
        for (average, owned) in self.stages[stage].iter_mut().zip(bucket.owned(flat)) {
            no_grad(|| average.copy_(&owned));
        }
    }

    /// Returns a stage's shards, and the share of their distance to the weights by which they move
    /// after this update; `None` if they stay.
    pub(super) fn moving(&mut self, stage: usize, update: u64) -> Option<(&mut [Tensor], f64)> {
        let share = self.settings.share_after(update - self.began)?;
        Some((&mut self.stages[stage], share))
    }
}
