//! What faults that were ordered do to a step's numbers, see [`fault`](crate::fault); nothing without an order.

use tch::{Kind, Tensor, no_grad};

use crate::fault::{self, Kind as Fault};
use crate::nn::Activations;
use crate::parallel::Replica;
use crate::pulse::Phase;

/// The model's outputs, times NaN or a factor that makes the loss stand out.
pub fn outputs(outputs: Activations) -> Activations {
    let factor = fault::argument(Fault::NanLoss, Phase::Forward, f64::NAN);
    let Some(factor) = factor.or_else(|| fault::argument(Fault::Spike, Phase::Forward, 50.0)) else { return outputs };
    let constants = Activations::new().carrying_constants_of(&outputs);
    outputs.flowing().fold(constants, |spoiled, (name, tensor)| spoiled.with(name, tensor * factor))
}

/// A stage's gradients, one number of them NaN.
pub fn gradients(stage: usize, gradients: Vec<Tensor>) -> Vec<Tensor> {
    if fault::argument(Fault::NanGrad, Phase::Backward, 0.0) == Some(stage as f64) {
        no_grad(|| drop(gradients[0].get(0).fill_(f64::NAN)));
    }
    gradients
}

/// A stage's parameters, one of them changed by its lowest bit.
pub fn parameters(replica: &mut Replica<'_>) {
    let Some(stage) = fault::argument(Fault::BitFlip, Phase::Optimizer, 0.0) else { return };
    replica.buckets[stage as usize].update(|_, master, _| drop(master.narrow(0, 0, 1).view_dtype(Kind::Int).g_add_scalar_(1)));
}
