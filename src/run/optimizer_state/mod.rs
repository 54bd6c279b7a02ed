//! This rank's shards of the optimizer's tensors and of the averaged weights, by stage and trained
//! piece.

mod averages;

pub use averages::Averages;

use tch::{Tensor, no_grad};

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::nn::Group;
use crate::optim::{Average, Slice, Update};
use crate::parallel::{Bucket, Devices, Loan, Replica, Shard};

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
    /// The averaged weights; `None` without `[ema]`.
    pub averages: Option<Averages>,
    rule: Box<dyn Update>,
}

impl OptimizerState {
    /// Returns zeros, and averages of the present weights: the state before the first step.
    ///
    /// # Errors
    /// If the device cannot run the optimizer.
    pub fn fresh(replica: &Replica<'_>, config: &RunConfig, devices: Devices) -> Result<Self> {
        let optimizer = &*config.optimizer.rule;
        let zeros_of_piece = |master: &Tensor| {
            let zeros = || Tensor::zeros(master.size(), (master.kind(), devices.home));
            optimizer.state_names().iter().map(|_| zeros()).collect()
        };
        let zeros_of_bucket = |bucket: &Bucket| {
            bucket.trained().map(|piece| zeros_of_piece(piece.values())).collect()
        };
        Ok(OptimizerState {
            stages: replica.buckets.iter().map(zeros_of_bucket).collect(),
            averages: config.ema.is_on().then(|| Averages::fresh(&config.ema, replica, devices)),
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

    /// Updates one stage, and its averages where this step moves them. What is kept on another
    /// device is copied to the gradient's device and back, one piece at a time.
    pub fn update(
        &mut self,
        stage: usize,
        bucket: &mut Bucket,
        gradients: &[Tensor],
        change: Change,
    ) {
        let OptimizerState { stages, averages, rule } = self;
        let averages = averages.as_mut();
        let (mut averages, share) = averages
            .and_then(|averages| averages.moving(stage, change.step))
            .map_or((None, 0.0), |(pieces, share)| (Some(pieces.iter_mut()), share));
        for ((shard, state), gradient) in bucket.shards_mut().zip(&mut stages[stage]).zip(gradients)
        {
            let average = averages.as_mut().and_then(Iterator::next);
            let mut piece = Visit::new(shard, state, average, gradient);
            piece.update(&**rule, change, share);
            piece.go_home();
        }
    }

    /// Runs `work` with a replica whose trained parameters are the averaged ones, if there are any,
    /// and those of the last step otherwise. Afterwards the replica is as before, to the last bit,
    /// also where `work` ends by a request to stop. After another error, with which the run ends,
    /// this rank's shards are as before, and nothing is gathered. Meanwhile the host holds another
    /// copy of this rank's shards if the model is computed in f32.
    ///
    /// # Errors
    /// Errors of `work` and of the collectives.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it, and a request to stop ends `work` on all of them
    /// alike.
    pub fn with_averages<T>(
        &self,
        replica: &mut Replica<'_>,
        work: impl FnOnce(&Replica<'_>) -> Result<T>,
    ) -> Result<T> {
        let Some(averages) = &self.averages else { return work(replica) };
        let lent = replica.buckets.iter_mut().enumerate();
        let loans: Vec<Loan> =
            lent.map(|(stage, bucket)| bucket.lend(averages.of_stage(stage))).collect();
        let outcome = replica.publish().and_then(|()| work(replica));
        replica.buckets.iter_mut().zip(loans).for_each(|(bucket, loan)| bucket.end_loan(loan));
        // The other ranks may not have met that error.
        if matches!(outcome, Ok(_) | Err(Error::Stopped { .. })) {
            replica.publish()?;
        }
        outcome
    }
}

/// A piece's tensors on the device that updates them, and where they are kept.
struct Visit<'u> {
    shard: Shard<'u>,
    params: Tensor,
    gradient: &'u Tensor,
    state: Vec<Tensor>,
    state_at_home: &'u mut [Tensor],
    average: Option<Tensor>,
    average_at_home: Option<&'u mut Tensor>,
}

impl<'u> Visit<'u> {
    fn new(
        shard: Shard<'u>,
        state: &'u mut [Tensor],
        average: Option<&'u mut Tensor>,
        gradient: &'u Tensor,
    ) -> Self {
        // `to_device` returns the same tensor if it is on that device already; copying that back
        // onto itself costs nothing.
        let here = |tensor: &Tensor| tensor.to_device(gradient.device());
        Visit {
            params: here(shard.master),
            gradient,
            state: state.iter().map(here).collect(),
            average: average.as_deref().map(here),
            shard,
            state_at_home: state,
            average_at_home: average,
        }
    }

    /// `share`: of its distance to the parameters by which the average moves.
    fn update(&mut self, rule: &dyn Update, change: Change, share: f64) {
        for group in self.shard.groups {
            self.update_group(group, rule, change, share);
        }
    }

    fn update_group(&mut self, group: &Group, rule: &dyn Update, change: Change, share: f64) {
        let Change { gradient_factor, lr, step } = change;
        let Group { elements, lr_factor, decay_factor, decayed } = group;
        let part =
            |tensor: &Tensor| tensor.narrow(0, elements.start, elements.end - elements.start);
        let mut computed = self.shard.computed.as_deref().map(part);
        let mut average = self.average.as_ref().map(part);
        let mut state: Vec<Tensor> = self.state.iter().map(part).collect();
        let slice = Slice {
            params: &mut part(&self.params),
            gradient: &part(self.gradient),
            gradient_factor,
            state: &mut state,
            computed: computed.as_mut(),
            average: average.as_mut().map(|values| Average { values, share }),
            decayed,
            decay_factor: *decay_factor,
        };
        rule.update(slice, lr * lr_factor, step);
    }

    fn go_home(self) {
        no_grad(|| {
            self.shard.master.copy_(&self.params);
            let state = self.state_at_home.iter_mut().zip(&self.state);
            state.for_each(|(home, visitor)| home.copy_(visitor));
            let average = self.average_at_home.zip(self.average.as_ref());
            average.into_iter().for_each(|(home, visitor)| home.copy_(visitor));
        });
    }
}
