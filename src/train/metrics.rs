//! One line of `metrics.jsonl`.

use serde::Serialize;

use crate::flow::SIGMA_BINS;
use crate::flow::report::StepFacts;
use crate::telemetry::tensorboard::EventValue;
use crate::train::step::Update;

/// Progress of a run after a step.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    pub step: u64,
    pub epoch: u64,
    pub samples_seen: u64,
    pub step_seconds: f64,
    pub samples_per_second: Option<f64>,
    pub peak_memory_bytes: Option<u64>,
}

/// A step's numbers over all ranks, as configs/README.md documents them. Texts, seconds and memory
/// are those of rank 0.
#[derive(Debug, Serialize)]
pub struct StepMetrics {
    step: u64,
    epoch: u64,
    samples_seen: u64,
    loss: f64,
    unweighted_loss: f64,
    grad_norm: f64,
    lr: f64,
    sigma_min: f64,
    sigma_max: f64,
    sigma_mean: f64,
    sigma_std: f64,
    timestep_min: f64,
    timestep_max: f64,
    timestep_mean: f64,
    timestep_std: f64,
    weight_min: f64,
    weight_max: f64,
    weight_mean: f64,
    weight_std: f64,
    noisy_min: f64,
    noisy_max: f64,
    /// Number of samples in each tenth of sigma.
    sigma_histogram: Vec<f64>,
    /// Mean unweighted loss in each tenth of sigma; null where no sample fell.
    loss_per_sigma: Vec<Option<f64>>,
    sampling_method: &'static str,
    /// Shift towards noise by which sigma was drawn.
    shift: f64,
    task_type: &'static str,
    data_type: &'static str,
    step_seconds: f64,
    data_seconds: f64,
    /// Seconds of waiting for noise and timesteps.
    draw_seconds: f64,
    forward_seconds: f64,
    backward_seconds: f64,
    /// Seconds of waiting for gradients and statistics of the other ranks.
    reduce_seconds: f64,
    optimizer_seconds: f64,
    /// Seconds of collectives in flight, in all phases.
    communication_seconds: f64,
    /// Seconds of these during which computation waited.
    exposed_seconds: f64,
    samples_per_second: Option<f64>,
    peak_memory_bytes: Option<u64>,
}

impl StepMetrics {
    pub fn new(update: &Update, progress: Progress) -> Self {
        let statistics = &update.statistics;
        let seconds = |phase: &str| {
            update
                .phases
                .iter()
                .find(|(name, _)| *name == phase)
                .map_or(0.0, |(_, seconds)| *seconds)
        };
        StepMetrics {
            step: progress.step,
            epoch: progress.epoch,
            samples_seen: progress.samples_seen,
            loss: statistics.loss,
            unweighted_loss: statistics.unweighted_loss,
            grad_norm: update.grad_norm,
            lr: update.lr,
            sigma_min: statistics.sigma.min,
            sigma_max: statistics.sigma.max,
            sigma_mean: statistics.sigma.mean,
            sigma_std: statistics.sigma.std(),
            timestep_min: statistics.timesteps.min,
            timestep_max: statistics.timesteps.max,
            timestep_mean: statistics.timesteps.mean,
            timestep_std: statistics.timesteps.std(),
            weight_min: statistics.weight.min,
            weight_max: statistics.weight.max,
            weight_mean: statistics.weight.mean,
            weight_std: statistics.weight.std(),
            noisy_min: statistics.noisy_latents.min,
            noisy_max: statistics.noisy_latents.max,
            sigma_histogram: statistics.sigma_histogram.to_vec(),
            loss_per_sigma: statistics.loss_per_sigma().to_vec(),
            sampling_method: update.sampling_method,
            shift: update.shift,
            task_type: update.task_type.word(),
            data_type: update.data_type,
            step_seconds: progress.step_seconds,
            data_seconds: seconds("data"),
            draw_seconds: seconds("draw"),
            forward_seconds: seconds("forward"),
            backward_seconds: seconds("backward"),
            reduce_seconds: seconds("reduce"),
            optimizer_seconds: seconds("optimizer"),
            communication_seconds: update.spent.communication_seconds,
            exposed_seconds: update.spent.exposed_seconds,
            samples_per_second: progress.samples_per_second,
            peak_memory_bytes: progress.peak_memory_bytes,
        }
    }

    /// Returns the facts of the step that the flow-matching logs need.
    pub fn facts(&self) -> StepFacts<'_> {
        StepFacts {
            step: self.step,
            sampling_method: self.sampling_method,
            shift: self.shift,
            task_type: self.task_type,
            data_type: self.data_type,
        }
    }

    /// Returns the numbers for TensorBoard by their tags.
    pub fn scalars(&self) -> Vec<(String, EventValue<'static>)> {
        let train = [
            ("loss", self.loss),
            ("unweighted_loss", self.unweighted_loss),
            ("grad_norm", self.grad_norm),
            ("lr", self.lr),
            ("epoch", self.epoch as f64),
            ("samples_seen", self.samples_seen as f64),
            ("sigma_mean", self.sigma_mean),
            ("weight_mean", self.weight_mean),
            ("shift", self.shift),
        ];
        let performance = [
            ("step_seconds", Some(self.step_seconds)),
            ("data_seconds", Some(self.data_seconds)),
            ("draw_seconds", Some(self.draw_seconds)),
            ("exposed_seconds", Some(self.exposed_seconds)),
            ("samples_per_second", self.samples_per_second),
            ("peak_memory_bytes", self.peak_memory_bytes.map(|bytes| bytes as f64)),
        ];
        let train = train.map(|(name, number)| (format!("train/{name}"), Some(number)));
        let performance = performance.map(|(name, number)| (format!("performance/{name}"), number));
        // Named by the middle of each bin.
        let middle = |bin: usize| (bin as f64 + 0.5) / SIGMA_BINS as f64;
        let by_sigma = self.loss_per_sigma.iter().enumerate();
        let by_sigma =
            by_sigma.map(|(bin, loss)| (format!("train/loss_sigma_{:.2}", middle(bin)), *loss));
        let all = train.into_iter().chain(by_sigma).chain(performance);
        all.filter_map(|(tag, number)| Some((tag, EventValue::Scalar(number? as f32)))).collect()
    }

    /// Formats gradient norm, learning rate, step time and throughput for the end of the summary
    /// line.
    pub fn pace(&self) -> String {
        let throughput = self
            .samples_per_second
            .map(|speed| format!(" | {speed:.0} samples/s"))
            .unwrap_or_default();
        format!(
            "norm {:.3} | lr {:.2e} | {:.3} s/step{throughput}",
            self.grad_norm, self.lr, self.step_seconds
        )
    }
}
