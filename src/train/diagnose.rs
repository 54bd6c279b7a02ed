//! Finds the rank, stage and samples that produced numbers that are not finite, by repeating the
//! step.
//!
//! Every draw follows from the step's number, so forward and backward repeat bit for bit, and steps
//! without a fault need no record. If the repeated step is finite, the first computation was
//! faulty.

use tch::{Kind, Tensor};

use crate::collective::gather_texts;
use crate::data::{Batch, Place};
use crate::error::Result;
use crate::flow::{EXPLODED, StepOutput, is_sound, latents_of};
use crate::parallel::Replica;
use crate::phase::Phase;
use crate::pulse;
use crate::telemetry::Stopwatch;
use crate::train::latents;
use crate::train::step::Stepper;

/// Maximum number of samples that a message names.
const NAMED: usize = 8;

/// The fault, and the rank that has it.
pub struct Finding {
    pub rank: usize,
    pub what: String,
}

/// Repeats a step's forward and backward on every rank, and checks each rank's own losses and
/// gradients.
///
/// # Ordering
/// Every rank calls it with its micro-batches of the step.
pub fn diagnose(
    stepper: &Stepper<'_>,
    step: u64,
    batches: &[Batch],
    replica: &Replica<'_>,
) -> Result<Finding> {
    pulse::enter(Phase::Diagnose);
    let mut own: Option<String> = None;
    for (micro_batch, batch) in batches.iter().enumerate() {
        let mut of_gradient = None;
        let look = &mut |stage, gradients: Vec<Tensor>| {
            if of_gradient.is_none() {
                of_gradient = bad_parameter(replica, stage, &gradients);
            }
            Ok(())
        };
        let drawn = stepper.draws.draw(Place { step, micro_batch }, batch)?;
        let output =
            stepper.forward_backward(step, batch, drawn, replica, look, &mut Stopwatch::start())?;
        let found = bad_samples(batch, &output).or_else(|| {
            let all = samples(batch, &output, (0..batch.sample_ids.len()).collect());
            of_gradient
                .map(|parameter| format!("{parameter}, while the losses of its {all} are sound"))
        });
        own = own.or(found.map(|what| format!("micro-batch {micro_batch}: {what}")));
    }
    let texts = gather_texts(stepper.collective, own.as_deref().unwrap_or_default())?;
    let found = texts.into_iter().enumerate().find(|(_, text)| !text.is_empty());
    let nobody = "every rank's own losses and gradients are finite when the step is repeated: their sum was not, or a device \
                  computed wrongly once";
    Ok(match found {
        Some((rank, text)) => Finding { rank, what: format!("rank {rank}, {text}") },
        None => Finding { rank: 0, what: nobody.into() },
    })
}

/// Describes the samples whose losses are not sound, with their noise levels; `None` if all are
/// sound.
fn bad_samples(batch: &Batch, output: &StepOutput) -> Option<String> {
    let losses = output.loss.sample_losses().detach().to_device(tch::Device::Cpu);
    let losses = Vec::<f32>::try_from(losses).expect("a loss a sample");
    let bad: Vec<usize> =
        (0..losses.len()).filter(|index| !is_sound(f64::from(losses[*index]))).collect();
    let average = output.loss.average_weighted_loss.double_value(&[]);
    match bad.first() {
        Some(first) => {
            let (loss, bound) = (losses[*first], beyond(f64::from(losses[*first])));
            Some(format!(
                "loss exploded: {loss}{bound} in {}{}",
                samples(batch, output, bad),
                unnormalised(batch)
            ))
        }
        // Auxiliary losses and weights can be unsound even if every sample's own loss is sound.
        None if !is_sound(average) => {
            Some(format!("loss exploded: {average}{} as the weighted mean", beyond(average)))
        }
        None => None,
    }
}

/// Names the bound that a finite but unsound loss exceeds.
fn beyond(loss: f64) -> String {
    if loss.is_nan() {
        String::new()
    } else {
        format!(" (above {EXPLODED}, the bound of train.check_loss)")
    }
}

/// Asks if the latents are normalised, if their spread suggests that they are not; otherwise empty.
fn unnormalised(batch: &Batch) -> String {
    let latents = latents_of(batch)
        .ok()
        .map(|latents| latents.to_kind(Kind::Float).std(false).double_value(&[]));
    latents.and_then(latents::question).map_or_else(String::new, |question| format!("; {question}"))
}

/// `samples 12, 31 at sigma 0.4711, 0.9`.
fn samples(batch: &Batch, output: &StepOutput, indices: Vec<usize>) -> String {
    let sigma = Vec::<f32>::try_from(output.sigma.to_device(tch::Device::Cpu))
        .expect("a noise level a sample");
    let joined = |texts: Vec<String>| texts.join(", ");
    let named = || indices.iter().take(NAMED);
    let more = if indices.len() > NAMED {
        format!(" and {} more", indices.len() - NAMED)
    } else {
        String::new()
    };
    let ids = joined(named().map(|index| batch.sample_ids[*index].to_string()).collect());
    let levels = joined(named().map(|index| format!("{:.4}", sigma[*index])).collect());
    format!("samples {ids}{more} at sigma {levels}")
}

/// Finds the first of a stage's parameters whose gradient is not finite. `gradients`: flat, one for
/// each trained piece.
fn bad_parameter(replica: &Replica<'_>, stage: usize, gradients: &[Tensor]) -> Option<String> {
    let mut named = replica.buckets[stage].by_name(replica.stages[stage].params(), gradients);
    named.find_map(|(info, gradient)| {
        let bad = gradient.isfinite().logical_not().sum(Kind::Int64).int64_value(&[]);
        (bad > 0).then(|| {
            format!(
                "{bad} numbers of the gradient of `{}` {:?} are not finite",
                info.name, info.shape
            )
        })
    })
}
