//! One flow-matching step, from batch to loss, for any model.

use tch::{Device, Kind, Tensor, no_grad};

use super::adapter::{FlowMatchingContext, ModelAdapter, TaskType, dropped};
use super::batch_keys::{LATENTS, dropped_keys, with_sample_axis};
use super::draw::{DrawRules, Drawn};
use super::image_tokens::ImageTokens;
use super::loss::{Huber, LossWeight};
use super::loss::{Kept, LossValues, check_loss};
use super::loss::{LOSS_MASK, loss_mask};
use super::schedule::LinearInterpolationSchedule;
use super::settings::{CfgDropout, FlowMatchingSettings};
use super::statistics::{Observed, Statistics};
use super::timesteps::SampledTimesteps;
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::nn::Activations;
use crate::rng::Stream;
use crate::tensor::broadcast_to_rank;

/// Flow matching for one model family on one device.
pub struct FlowMatchingPipeline {
    settings: FlowMatchingSettings,
    adapter: Box<dyn ModelAdapter>,
    loss_weight: LossWeight,
    /// `None` for the adapter's own loss.
    huber: Option<Huber>,
    image_tokens: ImageTokens,
    noise_schedule: LinearInterpolationSchedule,
    device: Device,
    /// Kind of latents, conditions and the model's computation.
    dtype: Kind,
}

/// Options of a step; by default those of the reference's `step`.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions {
    /// Number of the step in errors and logs.
    pub global_step: u64,
    /// True to measure [`Statistics`]; they stay on the device, without a host synchronization.
    pub collect_metrics: bool,
    /// True to refuse a loss that exploded, which costs one host synchronization.
    pub check_loss: bool,
}

impl Default for StepOptions {
    fn default() -> Self {
        StepOptions { global_step: 0, collect_metrics: true, check_loss: true }
    }
}

/// The results of a step.
#[derive(Debug)]
pub struct StepOutput {
    pub loss: LossValues,
    /// `[B]` f32.
    pub sigma: Tensor,
    /// `[B]` f32.
    pub timesteps: Tensor,
    /// `[B, …]` f32.
    pub noise: Tensor,
    /// `[B, …]` in the compute kind, the model's input.
    pub noisy_latents: Tensor,
    /// `[B, …]` in the compute kind.
    pub model_pred: Tensor,
    /// `[B, …]` f32.
    pub target: Tensor,
    pub sampling_method: &'static str,
    /// Shift towards noise by which sigma was drawn; 1 if it was drawn without one.
    pub shift: f64,
    pub task_type: TaskType,
    /// One row of [`Statistics`], if requested.
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
    pub fn new(
        settings: FlowMatchingSettings,
        adapter: Box<dyn ModelAdapter>,
        device: Device,
        dtype: Kind,
    ) -> Self {
        FlowMatchingPipeline {
            loss_weight: LossWeight::new(&settings, device),
            huber: Huber::new(&settings),
            image_tokens: ImageTokens::default(),
            noise_schedule: LinearInterpolationSchedule,
            settings,
            adapter,
            device,
            dtype,
        }
    }

    /// Sets how a sample's image tokens are counted, on which the shift may depend; by default each
    /// position of the latents is one.
    pub fn counting_tokens(self, image_tokens: ImageTokens) -> Self {
        FlowMatchingPipeline { image_tokens, ..self }
    }

    pub fn settings(&self) -> &FlowMatchingSettings {
        &self.settings
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn adapter(&self) -> &dyn ModelAdapter {
        self.adapter.as_ref()
    }

    /// Returns the rules by which the pipeline draws.
    pub fn draw_rules(&self) -> DrawRules {
        DrawRules::new(&self.settings, self.adapter.dropout(), &self.image_tokens, self.device)
    }

    /// Runs a step: draws, noise, model, loss. `model` maps the adapter's inputs to the model's
    /// outputs.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch does not fit, [`Error::NotFinite`] if the loss is checked and
    /// exploded, and errors of the model.
    pub fn step(
        &self,
        model: impl FnOnce(Activations) -> Result<Activations>,
        batch: &Batch,
        stream: &Stream,
        options: StepOptions,
    ) -> Result<StepOutput> {
        self.step_after_draws(model, batch, self.draw_rules().draw(batch, stream, None)?, options)
    }

    /// Does as [`step`](Self::step) with numbers that are drawn already, by
    /// [`draw_rules`](Self::draw_rules).
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_after_draws(
        &self,
        model: impl FnOnce(Activations) -> Result<Activations>,
        batch: &Batch,
        drawn: Drawn,
        options: StepOptions,
    ) -> Result<StepOutput> {
        let noisy = no_grad(|| self.prepare(batch, drawn))?;
        let NoisyBatch { latents, sampled, noise, noisy_latents, task_type, inputs } = noisy;
        let output = model(inputs)?;
        let model_pred = self.adapter.prediction(&output);
        let target = self.noise_schedule.velocity(&latents, &noise);
        let own_mask = self.adapter.loss_mask(&output);
        let mut loss = self.compute_loss(
            &model_pred,
            &target,
            &sampled.sigma,
            Some(batch),
            own_mask.as_ref(),
        )?;
        self.adapter
            .auxiliary_losses(&output)
            .iter()
            .for_each(|(_, auxiliary)| loss.add_auxiliary(auxiliary));
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
        let statistics =
            options.collect_metrics.then(|| no_grad(|| Statistics::measure(&observed)));
        let SampledTimesteps { sigma, timesteps, method, shift } = sampled;
        Ok(StepOutput {
            loss,
            sigma,
            timesteps,
            noise,
            noisy_latents,
            model_pred,
            target,
            sampling_method: method,
            shift,
            task_type,
            statistics,
        })
    }

    /// Computes the model's inputs from a batch and its random numbers.
    fn prepare(&self, batch: &Batch, drawn: Drawn) -> Result<NoisyBatch> {
        let latents = latents_of(batch)?.to_device(self.device).to_kind(self.dtype);
        let Drawn { task_type, image_to_video, sampled, noise, drop } = drawn.on(self.device);
        // A dataset's batches have all their axes.
        let alone = batch.sample_ids.is_empty().then(|| with_sample_axis(self.adapter(), batch));
        let batch = alone.as_ref().unwrap_or(batch);
        let noisy_latents = self.noise_schedule.forward(&latents, &noise, &sampled.sigma);
        let pipeline_drops = self.settings.cfg_dropout == CfgDropout::PerSample;
        let (dropped, drop) = match drop {
            Some(drop) if pipeline_drops => (Some(self.drop_conditions(batch, &drop)?), None),
            drop => (None, drop),
        };
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
            drop: drop.as_ref(),
            cfg_dropout_value: self.settings.cfg_dropout_value,
            guidance_scale: None,
        })?;
        Ok(NoisyBatch { latents, sampled, noise, noisy_latents, task_type, inputs })
    }

    /// Returns a batch of `samples` without conditions, as training drops them.
    ///
    /// # Errors
    /// [`Error::Data`] if the empty prompt is to take their place and the batch has none.
    pub fn without_conditions(&self, batch: &Batch, samples: i64) -> Result<Batch> {
        self.drop_conditions(batch, &Tensor::ones([samples], (Kind::Bool, Device::Cpu)))
    }

    /// Drops the conditions of the marked samples of the batch.
    fn drop_conditions(&self, batch: &Batch, drop: &Tensor) -> Result<Batch> {
        let (mut after, value) = (batch.alias(), self.settings.cfg_dropout_value);
        let size = drop.size()[0];
        for key in dropped_keys(self.adapter(), value) {
            let Some(tensor) = after.tensors.get_mut(key) else { continue };
            if tensor.size()[0] != size {
                let what = format!(
                    "`{key}` {:?} must have the latents' {size} samples for per-sample dropout",
                    tensor.size()
                );
                return Err(Error::data("batch", what));
            }
            *tensor = dropped(batch, key, tensor, drop, value)?;
        }
        Ok(after)
    }

    /// Refuses a batch that a step would refuse, with the same message, without a model.
    ///
    /// # Errors
    /// Errors of [`step`](Self::step), except those of the model.
    pub fn rehearse(&self, batch: &Batch) -> Result<()> {
        no_grad(|| {
            let latents = latents_of(batch)?;
            let drawn = self.draw_rules().draw(batch, &Stream::TorchSeed(0), None)?;
            self.prepare(batch, drawn)?;
            if self.settings.apply_loss_mask {
                loss_mask(batch, &latents.size(), self.device).map(drop)
            } else {
                Ok(())
            }
        })
    }

    /// Returns the weighted and unweighted loss of a prediction.
    ///
    /// # Shapes
    /// `model_pred`, `target`: `[B, …]`, equal; `sigma`: `[B]` f32; `own_mask`: the adapter's, if
    /// it leaves elements out, of the prediction's rank and broadcastable to it.
    ///
    /// # Errors
    /// [`Error::Data`] if `apply_loss_mask` is set and the batch has no `loss_mask`, or one that
    /// does not fit the loss.
    pub fn compute_loss(
        &self,
        model_pred: &Tensor,
        target: &Tensor,
        sigma: &Tensor,
        batch: Option<&Batch>,
        own_mask: Option<&Tensor>,
    ) -> Result<LossValues> {
        let unweighted_loss = match &self.huber {
            None => self.adapter.compute_loss(model_pred, target),
            Some(huber) => huber.loss(model_pred, target, sigma),
        };
        let loss_weight =
            broadcast_to_rank(&self.loss_weight.weights(sigma), unweighted_loss.dim());
        let is_weighted = !matches!(self.loss_weight, LossWeight::One);
        let weighted_loss = if is_weighted {
            &unweighted_loss * &loss_weight
        } else {
            unweighted_loss.shallow_clone()
        };
        let carried =
            batch.and_then(|batch| batch.get(LOSS_MASK)).map(|mask| mask.to_device(self.device));
        let kept = self.kept(batch, own_mask, &unweighted_loss)?;
        let (average_weighted_loss, objective) = kept.mean_and_objective(&weighted_loss);
        let average_unweighted_loss = if is_weighted {
            kept.mean_and_objective(&unweighted_loss).0
        } else {
            average_weighted_loss.shallow_clone()
        };
        Ok(LossValues {
            weighted_loss,
            average_weighted_loss,
            unweighted_loss,
            average_unweighted_loss,
            loss_weight,
            loss_mask: carried,
            kept,
            objective,
        })
    }

    /// Returns the mean squared error of each sample, `[B]` f32, times the masks' weights: the loss
    /// by which models are judged, whatever that of training is.
    pub fn squared_errors(&self, output: &StepOutput) -> Tensor {
        match self.huber {
            None => output.loss.sample_losses(),
            Some(_) => {
                let errors = self.adapter.compute_loss(&output.model_pred, &output.target);
                output.loss.sample_means(&errors)
            }
        }
    }

    /// Returns the elements that the adapter's mask and, if it is applied, the batch's mask keep.
    fn kept(
        &self,
        batch: Option<&Batch>,
        own_mask: Option<&Tensor>,
        loss: &Tensor,
    ) -> Result<Kept> {
        let mut masks = Vec::new();
        if self.settings.apply_loss_mask {
            let batch = batch.ok_or_else(|| {
                Error::data("batch", "apply_loss_mask is set and there is no batch to have a mask")
            })?;
            masks.push(loss_mask(batch, &loss.size(), self.device)?);
        }
        masks.extend(own_mask.map(|mask| mask.to_kind(Kind::Float)));
        Ok(Kept::by_masks(masks))
    }
}

/// Returns the batch's clean latents; `video_latents` take precedence over `image_latents`.
///
/// # Errors
/// [`Error::Data`] if there are none, or they have neither 4 nor 5 axes.
pub fn latents_of(batch: &Batch) -> Result<&Tensor> {
    let found = LATENTS.into_iter().find_map(|key| batch.get(key));
    let latents = found
        .ok_or_else(|| Error::data("batch", "has neither `video_latents` nor `image_latents`"))?;
    match latents.dim() {
        4 | 5 => Ok(latents),
        _ => Err(Error::data(
            "batch",
            format!("latents must be [B, C, H, W] or [B, C, F, H, W], found {:?}", latents.size()),
        )),
    }
}
