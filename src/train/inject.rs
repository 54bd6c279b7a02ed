//! What faults that were ordered do to a step's numbers, see [`fault`](crate::fault); nothing
//! without an order.

use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Kind, Tensor, no_grad};

use crate::collective::{Collective, ReduceOp};
use crate::error::Result;
use crate::fault::{self, Kind as Fault};
use crate::nn::Activations;
use crate::parallel::Replica;
use crate::phase::Phase;

/// The model's outputs, times NaN or a factor that makes the loss stand out.
pub fn outputs(outputs: Activations) -> Activations {
    static STRUCK: AtomicBool = AtomicBool::new(false);
    let nan = fault::argument(Fault::NanLoss, Phase::Forward, f64::NAN);
    let nan = nan
        .filter(|argument| argument.is_nan() || !STRUCK.swap(true, Ordering::Relaxed))
        .map(|_| f64::NAN);
    let Some(factor) = nan.or_else(|| fault::argument(Fault::Spike, Phase::Forward, 50.0)) else {
        return outputs;
    };
    let constants = Activations::new().carrying_constants_of(&outputs);
    outputs.flowing().fold(constants, |spoiled, (name, tensor)| spoiled.with(name, tensor * factor))
}

/// A collective that this rank issues alone.
pub fn collectives(collective: &dyn Collective) -> Result<()> {
    match fault::argument(Fault::ExtraCollective, Phase::Reduce, 0.0) {
        Some(_) => collective
            .all_reduce(vec![Tensor::zeros([3], (Kind::Float, Device::Cpu))], ReduceOp::Sum)?
            .wait(),
        None => Ok(()),
    }
}

/// A stage's gradients, one number of them NaN.
pub fn gradients(stage: usize, gradients: Vec<Tensor>) -> Vec<Tensor> {
    if fault::argument(Fault::NanGrad, Phase::Backward, 0.0) == Some(stage as f64) {
        no_grad(|| drop(gradients[0].get(0).fill_(f64::NAN)));
    }
    gradients
}

/// A stage's parameters, one of them changed by its lowest bit.
pub fn parameters(phase: Phase, replica: &mut Replica<'_>) {
    let Some(stage) = fault::argument(Fault::BitFlip, phase, 0.0) else { return };
    replica.buckets[stage as usize]
        .update(|master| drop(master.narrow(0, 0, 1).view_dtype(Kind::Int).g_add_scalar_(1)));
}
