//! The detailed and the summary log of a step, as text. They have every field of the reference's
//! logs, over all ranks.

use super::settings::{FlowMatchingSettings, LossWeightingScheme};
use super::statistics::{Range, Statistics};
use super::time_shift::ShiftType;
use crate::settings::Choice;

const RULER: &str =
    "================================================================================";

/// Facts about a step in a log, besides its statistics.
#[derive(Clone, Copy, Debug)]
pub struct StepFacts<'a> {
    pub step: u64,
    pub sampling_method: &'a str,
    /// Shift towards noise by which sigma was drawn; 1 if it was drawn without one.
    pub shift: f64,
    pub task_type: &'a str,
    pub data_type: &'a str,
}

/// Formats a step as one line.
pub fn summary(facts: StepFacts<'_>, statistics: &Statistics) -> String {
    let Statistics { sigma, timesteps, weight, noisy_latents, loss, .. } = statistics;
    format!(
        "[STEP {}] σ=[{:.3}, {:.3}] | t=[{:.1}, {:.1}] | noisy=[{:.1}, {:.1}] | {} | Loss: {:.6} | w=[{:.2}, {:.2}]",
        facts.step,
        sigma.min,
        sigma.max,
        timesteps.min,
        timesteps.max,
        noisy_latents.min,
        noisy_latents.max,
        facts.sampling_method,
        loss,
        weight.min,
        weight.max,
    )
}

/// Formats a step as a block of lines: the noising of the batch, then the prediction.
pub fn detailed(
    facts: StepFacts<'_>,
    statistics: &Statistics,
    settings: &FlowMatchingSettings,
) -> String {
    [flow_lines(facts, statistics, settings), loss_lines(facts, statistics, settings)]
        .concat()
        .join("\n")
}

fn flow_lines(
    facts: StepFacts<'_>,
    statistics: &Statistics,
    settings: &FlowMatchingSettings,
) -> Vec<String> {
    let Statistics { sigma, timesteps, latents, noise, noisy_latents, .. } = statistics;
    let spread = if sigma.count > 1.0 {
        format!("mean {:.4}, std {:.4}", sigma.mean, sigma.std())
    } else {
        format!("value {:.4}", sigma.mean)
    };
    vec![
        RULER.into(),
        format!("[STEP {}] FLOW MATCHING: x = (1 - σ)·latents + σ·noise", facts.step),
        RULER.into(),
        format!(
            "[SAMPLING] Method: {} | task {} | data {}",
            facts.sampling_method, facts.task_type, facts.data_type
        ),
        shift_line(facts.shift, settings),
        format!("[BATCH] Size: {}", sigma.count),
        format!("[SIGMA] Range: [{:.4}, {:.4}], {spread}", sigma.min, sigma.max),
        format!("[TIMESTEPS] Range: [{:.2}, {:.2}]", timesteps.min, timesteps.max),
        format!(
            "[RANGES] Clean latents: {} | noise: {} | noisy latents: {}",
            shown(latents),
            shown(noise),
            shown(noisy_latents)
        ),
        sanity(latents, noise, noisy_latents),
    ]
}

fn loss_lines(
    facts: StepFacts<'_>,
    statistics: &Statistics,
    settings: &FlowMatchingSettings,
) -> Vec<String> {
    let Statistics { weight, prediction, target, loss, unweighted_loss, .. } = statistics;
    let formula = match (settings.use_loss_weighting, settings.loss_weighting_scheme) {
        (false, _) => "1".into(),
        (true, LossWeightingScheme::Linear) => format!("1 + {}·σ", settings.flow_shift),
        (true, LossWeightingScheme::Bsmntw) => "bell over the timesteps (bsmntw)".into(),
        (true, LossWeightingScheme::SigmaSqrt) => "σ⁻²".into(),
        (true, LossWeightingScheme::Cosmap) => "2/(π·(1 - 2σ + 2σ²))".into(),
    };
    let impact = loss / unweighted_loss.max(1e-8);
    vec![
        RULER.into(),
        format!("[STEP {}] LOSS DEBUG: target = noise - latents", facts.step),
        RULER.into(),
        format!("[RANGES] Prediction: {} | target: {}", shown(prediction), shown(target)),
        format!(
            "[WEIGHTS] w = {formula} | range: [{:.4}, {:.4}], mean {:.4}",
            weight.min, weight.max, weight.mean
        ),
        format!(
            "[LOSS] Unweighted: {unweighted_loss:.6} | weighted: {loss:.6} | impact {impact:.3}x"
        ),
        RULER.into(),
    ]
}

/// Returns the reference's line, or that of a shift which follows from the number of tokens.
fn shift_line(shift: f64, settings: &FlowMatchingSettings) -> String {
    match settings.shift_type {
        ShiftType::Constant => format!("[FLOW] Shift: {}", settings.flow_shift),
        rule => format!("[FLOW] Shift: {shift:.4}, mu {:.4}, by {}", shift.ln(), rule.word()),
    }
}

fn shown(range: &Range) -> String {
    format!("[{:.4}, {:.4}]", range.min, range.max)
}

/// Checks that the mixture of two tensors does not reach far beyond both.
fn sanity(latents: &Range, noise: &Range, noisy: &Range) -> String {
    let reach = |range: &Range| range.min.abs().max(range.max.abs());
    let bound = 1.5 * reach(latents).max(reach(noise));
    if reach(noisy) > bound {
        format!("[CHECK] WARNING: noisy latents reach beyond ±{bound:.1}")
    } else {
        "[CHECK] OK".into()
    }
}
