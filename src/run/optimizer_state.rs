//! The optimizer's tensors: this rank's shards of them, by stage and piece.

use tch::{Tensor, no_grad};

use crate::error::Result;
use crate::optim::{Optimizer, Slice, Update};
use crate::parallel::{Bucket, Devices, Replica, Shard};

/// What one step does to every parameter.
#[derive(Clone, Copy)]
pub struct Change {
    /// Of every gradient: the clipping's coefficient.
    pub gradient_factor: f64,
    pub lr: f64,
    /// Counts from 1.
    pub step: u64,
}

/// One tensor for each piece of each stage and each of the optimizer's state names.
pub struct OptimizerState {
    /// By stage, piece, name.
    stages: Vec<Vec<Vec<Tensor>>>,
    rule: Box<dyn Update>,
}

impl OptimizerState {
    /// Zeros, as before the first step.
    ///
    /// # Errors
    /// If the device cannot carry the optimizer out.
    pub fn fresh(
        replica: &Replica<'_>,
        optimizer: &dyn Optimizer,
        devices: Devices,
    ) -> Result<Self> {
        let of_piece = |master: &Tensor| {
            let zeros = || Tensor::zeros(master.size(), (master.kind(), devices.home));
            optimizer.state_names().iter().map(|_| zeros()).collect()
        };
        let of_bucket = |bucket: &Bucket| {
            bucket.pieces().iter().map(|piece| of_piece(piece.master())).collect()
        };
        Ok(OptimizerState {
            stages: replica.buckets.iter().map(of_bucket).collect(),
            rule: optimizer.on(devices.compute)?,
        })
    }

    /// A stage's tensor of the optimizer's name number `name`, whole: `[P]` f32.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn whole(&self, stage: usize, name: usize, replica: &Replica<'_>) -> Result<Tensor> {
        let owned: Vec<Tensor> =
            self.stages[stage].iter().map(|piece| piece[name].shallow_clone()).collect();
        replica.buckets[stage].whole(&owned, &replica.sharing)
    }

    /// Keeps this rank's shards of a stage's whole tensor.
    pub fn set(&mut self, stage: usize, name: usize, flat: &Tensor, bucket: &Bucket) {
        for (piece, owned) in self.stages[stage].iter_mut().zip(bucket.owned(flat)) {
            no_grad(|| piece[name].copy_(&owned));
        }
    }

    /// One update of a stage. Master values and state that live elsewhere visit the gradient's
    /// device, a piece at a time.
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
            // The same tensors where they are there already, and copies onto themselves cost
            // nothing.
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
