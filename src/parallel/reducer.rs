//! Gradients on their way from one rank's backward to everybody's mean.

use tch::{Kind, Tensor, no_grad};

use crate::collective::{Collective, ReduceOp, Work};
use crate::error::Result;

/// Collects one optimizer step's gradients: sums micro-batches, and starts each stage's all-reduce as soon as its last
/// micro-batch is through, so that it travels while the stage before computes.
pub struct Reducer<'c> {
    collective: &'c dyn Collective,
    /// One slot a stage: the sum over micro-batches so far, `[P]` f32.
    gradients: Vec<Option<Tensor>>,
    under_way: Vec<Work>,
}

impl<'c> Reducer<'c> {
    pub fn new(collective: &'c dyn Collective, num_stages: usize) -> Self {
        Reducer { collective, gradients: (0..num_stages).map(|_| None).collect(), under_way: Vec::new() }
    }

    /// Takes a stage's gradient of one micro-batch.
    ///
    /// # Ordering
    /// Every rank gives the same stages in the same order, `last` on the same micro-batch.
    pub fn add(&mut self, stage: usize, gradient: Tensor, last: bool) -> Result<()> {
        let sum = match self.gradients[stage].take() {
            Some(mut sum) => no_grad(|| sum.f_add_(&gradient)).expect("gradients of one stage have one shape"),
            None => gradient.to_kind(Kind::Float),
        };
        if last {
            self.under_way.push(self.collective.all_reduce(vec![sum.shallow_clone()], ReduceOp::Sum)?);
        }
        self.gradients[stage] = Some(sum);
        Ok(())
    }

    /// Waits for the collectives; returns the mean gradient of each stage, none for a stage that is not trained.
    pub fn finish(self) -> Result<Vec<Option<Tensor>>> {
        self.under_way.into_iter().try_for_each(Work::wait)?;
        Ok(self.gradients)
    }
}
