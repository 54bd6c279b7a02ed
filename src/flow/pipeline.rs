//! One flow-matching step: batch in, loss out, whatever the model.

use tch::{Device, Kind, Tensor, no_grad};

use super::adapter::{FlowMatchingContext, ModelAdapter, TaskType, dropped};
use super::loss::{LossValues, check_loss, masked_mean};
use super::loss_weight::LossWeight;
use super::schedule::LinearInterpolationSchedule;
use super::settings::{CfgDropout, CfgDropoutValue, FlowMatchingSettings, TaskScope};
use super::statistics::{Observed, Statistics};
use super::timestep_sampling::{SampledTimesteps, Strata, sample_timesteps};
use crate::data::{Batch, DataType};
use crate::error::{Error, Result};
use crate::nn::Activations;
use crate::rng::{Draws, Stream};
use crate::tensor::broadcast_to_rank;

/// Flow matching for one model family on one device.
pub struct FlowMatchingPipeline {
    settings: FlowMatchingSettings,
    adapter: Box<dyn ModelAdapter>,
    loss_weight: LossWeight,
    noise_schedule: LinearInterpolationSchedule,
    device: Device,
    /// Kind of latents, conditions and the model's computation.
    dtype: Kind,
}

/// What a step does besides the loss.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions<'a> {
    /// Number of the step in errors and logs.
    pub global_step: u64,
    /// Whether to measure [`Statistics`]; they stay on the device, without a host synchronization.
    pub collect_metrics: bool,
    /// Whether to look at the loss and refuse one that exploded; one host synchronization.
    pub check_loss: bool,
    /// Places of the samples among the global batch's strata, with `stratified_timesteps`.
    pub strata: Option<&'a Strata>,
}

/// All that a step computed.
#[derive(Debug)]
pub struct StepOutput {
    pub loss: LossValues,
    /// `[B]` f32.
    pub sigma: Tensor,
    /// `[B]` f32.
    pub timesteps: Tensor,
    /// `[B, …]` f32.
    pub noise: Tensor,
    /// `[B, …]` in the compute kind, as the model saw them.
    pub noisy_latents: Tensor,
    /// `[B, …]` in the compute kind.
    pub model_pred: Tensor,
    /// `[B, …]` f32.
    pub target: Tensor,
    pub sampling_method: &'static str,
    pub task_type: TaskType,
    /// One row of [`Statistics`], if they were asked for.
    pub statistics: Option<Tensor>,
}

/// A batch after all draws.
struct NoisyBatch {
    latents: Tensor,
    sampled: SampledTimesteps,
    noise: Tensor,
    noisy_latents: Tensor,
    task_type: TaskType,
    inputs: Activations,
}

impl FlowMatchingPipeline {
    pub fn new(settings: FlowMatchingSettings, adapter: Box<dyn ModelAdapter>, device: Device, dtype: Kind) -> Self {
        let loss_weight = LossWeight::new(&settings, device);
        FlowMatchingPipeline { settings, adapter, loss_weight, noise_schedule: LinearInterpolationSchedule, device, dtype }
    }

    pub fn settings(&self) -> &FlowMatchingSettings {
        &self.settings
    }

    pub fn adapter(&self) -> &dyn ModelAdapter {
        self.adapter.as_ref()
    }

    /// Draws, noise, model, loss. `model` maps the adapter's inputs to the model's outputs.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch does not fit, [`Error::NotFinite`] if the loss is checked and exploded, and whatever the
    /// model returns.
    pub fn step(
        &self,
        model: impl FnOnce(Activations) -> Result<Activations>,
        batch: &Batch,
        stream: &Stream,
        options: StepOptions<'_>,
    ) -> Result<StepOutput> {
        let noisy = no_grad(|| self.prepare(batch, &stream.open(), options.strata))?;
        let NoisyBatch { latents, sampled, noise, noisy_latents, task_type, inputs } = noisy;
        let output = model(inputs)?;
        let model_pred = self.adapter.prediction(&output);
        let target = self.noise_schedule.velocity(&latents, &noise);
        let own_mask = self.adapter.loss_mask(&output);
        let mut loss = self.compute_loss(&model_pred, &target, &sampled.sigma, Some(batch), own_mask.as_ref())?;
        for (_, auxiliary) in self.adapter.auxiliary_losses(&output) {
            // Out of place: without weights both averages are one tensor.
            loss.average_weighted_loss = &loss.average_weighted_loss + auxiliary;
        }
        if options.check_loss {
            check_loss(loss.average_weighted_loss.double_value(&[]), options.global_step)?;
        }
        let observed = Observed {
            sigma: &sampled.sigma,
            timesteps: &sampled.timesteps,
            latents: &latents,
            noise: &noise,
            noisy_latents: &noisy_latents,
            model_pred: &model_pred,
            target: &target,
            loss: &loss,
        };
        let statistics = options.collect_metrics.then(|| no_grad(|| Statistics::measure(&observed)));
        let SampledTimesteps { sigma, timesteps, method } = sampled;
        Ok(StepOutput { loss, sigma, timesteps, noise, noisy_latents, model_pred, target, sampling_method: method, task_type, statistics })
    }

    /// Every draw of a step, in the order of the reference: task, timesteps, noise, then the adapter's.
    fn prepare(&self, batch: &Batch, draws: &Draws<'_>, strata: Option<&Strata>) -> Result<NoisyBatch> {
        let latents = latents_of(batch)?.to_device(self.device).to_kind(self.dtype);
        let size = latents.size()[0];
        let (task_type, image_to_video) = self.determine_task_type(batch.data_type, size, draws);
        let sampled = self.sample_timesteps(size, draws, strata);
        let noise = draws.normal(0.0, 1.0, &latents.size()).to_device(self.device);
        let noisy_latents = self.noise_schedule.forward(&latents.to_kind(Kind::Float), &noise, &sampled.sigma).to_kind(self.dtype);
        let pipeline_drops = self.settings.cfg_dropout == CfgDropout::PerSample;
        let dropped = if pipeline_drops { Some(self.drop_conditions(batch, size, draws)?) } else { None };
        let inputs = self.adapter.prepare_inputs(&FlowMatchingContext {
            noisy_latents: &noisy_latents,
            latents: &latents,
            timesteps: &sampled.timesteps,
            sigma: &sampled.sigma,
            image_to_video: &image_to_video,
            data_type: batch.data_type,
            device: self.device,
            dtype: self.dtype,
            batch: dropped.as_ref().unwrap_or(batch),
            cfg_dropout_prob: if pipeline_drops { 0.0 } else { self.settings.cfg_dropout_prob },
            cfg_dropout_value: self.settings.cfg_dropout_value,
            guidance_scale: None,
            draws,
        })?;
        Ok(NoisyBatch { latents, sampled, noise, noisy_latents, task_type, inputs })
    }

    /// Image-to-video with the configured probability for video, by a host draw for the batch or by one draw a sample;
    /// text-to-video otherwise. Also which samples are image-to-video, `[B]` boolean.
    pub fn determine_task_type(&self, data_type: DataType, batch: i64, draws: &Draws<'_>) -> (TaskType, Tensor) {
        let all = |value: bool| Tensor::full([batch], i64::from(value), (Kind::Bool, self.device));
        match (data_type, self.settings.task_scope) {
            (DataType::Video, TaskScope::Sample) => {
                (TaskType::Mixed, draws.uniform(&[batch]).lt(self.settings.i2v_prob).to_device(self.device))
            }
            (DataType::Video, TaskScope::Batch) if draws.host_coin(self.settings.i2v_prob) => (TaskType::ImageToVideo, all(true)),
            _ => (TaskType::TextToVideo, all(false)),
        }
    }

    /// Noise levels of a batch, on the pipeline's device.
    pub fn sample_timesteps(&self, batch: i64, draws: &Draws<'_>, strata: Option<&Strata>) -> SampledTimesteps {
        let SampledTimesteps { sigma, timesteps, method } = sample_timesteps(&self.settings, draws, batch, strata);
        SampledTimesteps { sigma: sigma.to_device(self.device), timesteps: timesteps.to_device(self.device), method }
    }

    /// The batch with some samples' conditions dropped, each by its own draw.
    fn drop_conditions(&self, batch: &Batch, size: i64, draws: &Draws<'_>) -> Result<Batch> {
        let mut after = batch.alias();
        let (drop, value) = (draws.uniform(&[size]).lt(self.settings.cfg_dropout_prob), self.settings.cfg_dropout_value);
        // A mask goes with the empty prompt; where conditions become zeros it stays.
        let masks = if value == CfgDropoutValue::EmptyPrompt { self.adapter.mask_keys() } else { &[] };
        for key in self.adapter.condition_keys().iter().chain(masks) {
            let Some(tensor) = after.tensors.get_mut(*key) else { continue };
            if tensor.size()[0] != size {
                let what = format!("`{key}` {:?} must have the latents' {size} samples for per-sample dropout", tensor.size());
                return Err(Error::data("batch", what));
            }
            *tensor = dropped(batch, key, tensor, &drop, value)?;
        }
        Ok(after)
    }

    /// Weighted and unweighted loss of a prediction.
    ///
    /// # Shapes
    /// `model_pred`, `target`: `[B, …]`, equal; `sigma`: `[B]` f32; `own_mask`: the adapter's, if it leaves elements out.
    ///
    /// # Errors
    /// [`Error::Data`] if `apply_loss_mask` is set and the batch has no `loss_mask` that broadcasts over the loss.
    pub fn compute_loss(
        &self,
        model_pred: &Tensor,
        target: &Tensor,
        sigma: &Tensor,
        batch: Option<&Batch>,
        own_mask: Option<&Tensor>,
    ) -> Result<LossValues> {
        let unweighted_loss = self.adapter.compute_loss(model_pred, target);
        let loss_weight = broadcast_to_rank(&self.loss_weight.of(sigma), unweighted_loss.dim());
        let is_weighted = !matches!(self.loss_weight, LossWeight::One);
        let weighted_loss = if is_weighted { &unweighted_loss * &loss_weight } else { unweighted_loss.shallow_clone() };
        let loss_mask = batch.and_then(|batch| batch.get("loss_mask")).map(|mask| mask.to_device(self.device));
        let applied = match (&loss_mask, self.settings.apply_loss_mask) {
            (_, false) => None,
            (Some(mask), true) => Some(mask),
            (None, true) => return Err(Error::data("batch", "apply_loss_mask is set and the batch has no `loss_mask`")),
        };
        let masks: Vec<&Tensor> = applied.into_iter().chain(own_mask).collect();
        let average = |loss: &Tensor| if masks.is_empty() { Ok(loss.mean(Kind::Float)) } else { masked_mean(loss, &masks) };
        let average_weighted_loss = average(&weighted_loss)?;
        let average_unweighted_loss = if is_weighted { average(&unweighted_loss)? } else { average_weighted_loss.shallow_clone() };
        Ok(LossValues { weighted_loss, average_weighted_loss, unweighted_loss, average_unweighted_loss, loss_weight, loss_mask })
    }
}

/// The batch's clean latents; `video_latents` win over `image_latents`.
///
/// # Errors
/// [`Error::Data`] if there are none, or they have neither 4 nor 5 axes.
pub fn latents_of(batch: &Batch) -> Result<&Tensor> {
    let found = batch.get("video_latents").or_else(|| batch.get("image_latents"));
    let latents = found.ok_or_else(|| Error::data("batch", "has neither `video_latents` nor `image_latents`"))?;
    match latents.dim() {
        4 | 5 => Ok(latents),
        _ => Err(Error::data("batch", format!("latents must be [B, C, H, W] or [B, C, F, H, W], found {:?}", latents.size()))),
    }
}
