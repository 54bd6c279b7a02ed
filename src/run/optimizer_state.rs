//! This rank's shards of the optimizer's tensors, by stage and trained piece.

use tch::{Tensor, no_grad};

use crate::error::Result;
use crate::optim::{Optimizer, Slice, Update};
use crate::parallel::{Bucket, Devices, Replica, Shard};

/// The numbers with which one step updates every parameter.
#[derive(Clone, Copy)]
pub struct Change {
    /// Factor of every gradient: the clipping coefficient.
    pub gradient_factor: f64,
    pub lr: f64,
    /// Number of the update, from 1.
    pub step: u64,
}

/// One tensor for each trained piece of each stage and each of the optimizer's state names.
pub struct OptimizerState {
    /// Tensors by stage, piece and state name.
    stages: Vec<Vec<Vec<Tensor>>>,
    rule: Box<dyn Update>,
}

impl OptimizerState {
    /// Returns zeros, the state before the first step.
    ///
    /// # Errors
    /// If the device cannot run the optimizer.
    pub fn fresh(
        replica: &Replica<'_>,
        optimizer: &dyn Optimizer,
        devices: Devices,
    ) -> Result<Self> {
        let zeros_of_piece = |master: &Tensor| {
            let zeros = || Tensor::zeros(master.size(), (master.kind(), devices.home));
            optimizer.state_names().iter().map(|_| zeros()).collect()
        };
        let zeros_of_bucket = |bucket: &Bucket| {
            bucket.trained().map(|piece| zeros_of_piece(piece.values())).collect()
        };
        Ok(OptimizerState {
            stages: replica.buckets.iter().map(zeros_of_bucket).collect(),
            rule: optimizer.on(devices.compute)?,
        })
    }

    /// Returns a stage's whole state tensor number `name`, with an element for each trained
    /// parameter's: f32.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn whole(&self, stage: usize, name: usize, replica: &Replica<'_>) -> Result<Tensor> {
        let owned: Vec<Tensor> =
            self.stages[stage].iter().map(|piece| piece[name].shallow_clone()).collect();
        replica.buckets[stage].whole(&owned, &replica.sharing)
    }

    /// Copies this rank's shards out of a stage's whole tensor.
    pub fn set(&mut self, stage: usize, name: usize, flat: &Tensor, bucket: &Bucket) {
        for (piece, owned) in self.stages[stage].iter_mut().zip(bucket.owned(flat)) {
            no_grad(|| piece[name].copy_(&owned));
        }
    }

    /// Updates one stage. Master values and state on another device are copied to the gradient's
    /// device and back, one piece at a time.
    pub fn update(
        &mut self,
        stage: usize,
        bucket: &mut Bucket,
        gradients: &[Tensor],
        change: Change,
    ) {
        let Change { gradient_factor, lr, step } = change;
        for ((shard, state), gradient) in
            bucket.shards_mut().zip(&mut self.stages[stage]).zip(gradients)
        {
            let Shard { master, computed, decayed } = shard;
            // `to_device` returns the same tensor if it is on that device already; copying that
            // back onto itself costs nothing.
            let mut params = master.to_device(gradient.device());
            let mut visitors: Vec<Tensor> =
                state.iter().map(|tensor| tensor.to_device(gradient.device())).collect();
            let slice = Slice {
                params: &mut params,
                gradient,
                gradient_factor,
                state: &mut visitors,
                computed,
                decayed,
            };
            self.rule.update(slice, lr, step);
            no_grad(|| {
                master.copy_(&params);
                state.iter_mut().zip(&visitors).for_each(|(home, visitor)| home.copy_(visitor));
            });
        }
    }
}
