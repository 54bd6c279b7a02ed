//! Injects faults into a step's numbers if the environment requests them, see
//! [`fault`](crate::fault); otherwise returns them unchanged.

use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Kind, Tensor, no_grad};

use crate::collective::{Collective, ReduceOp};
use crate::error::Result;
use crate::fault::{self, Kind as Fault};
use crate::nn::Activations;
use crate::parallel::Replica;
use crate::phase::Phase;

/// Multiplies the model's outputs by NaN, or by a factor that makes the loss a spike.
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

/// Issues a collective on this rank alone.
pub fn collectives(collective: &dyn Collective) -> Result<()> {
    match fault::argument(Fault::ExtraCollective, Phase::Reduce, 0.0) {
        Some(_) => collective
            .all_reduce(vec![Tensor::zeros([3], (Kind::Float, Device::Cpu))], ReduceOp::Sum)?
            .wait(),
        None => Ok(()),
    }
}

/// Sets one number of a stage's gradients to NaN.
pub fn gradients(stage: usize, gradients: Vec<Tensor>) -> Vec<Tensor> {
    if fault::argument(Fault::NanGrad, Phase::Backward, 0.0) == Some(stage as f64) {
        no_grad(|| drop(gradients[0].get(0).fill_(f64::NAN)));
    }
    gradients
}

/// Adds 1 to the bit pattern of one of a stage's parameters.
pub fn parameters(phase: Phase, replica: &mut Replica<'_>) {
    let Some(stage) = fault::argument(Fault::BitFlip, phase, 0.0) else { return };
    replica.buckets[stage as usize]
        .update(|master| drop(master.narrow(0, 0, 1).view_dtype(Kind::Int).g_add_scalar_(1)));
}
