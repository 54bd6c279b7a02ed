//! What flow matching asks of a model family.

use tch::{Device, Kind, Tensor};

use super::guidance::Guidance;
use super::noise_levels::{NoiseLevels, Shift};
use super::settings::FlowMatchingSettings;
use crate::data::{Batch, DataType};
use crate::error::Result;
use crate::nn::Activations;
use crate::rng::Draws;

/// What a video batch is trained to do; images are always text-to-video in the reference's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskType {
    TextToVideo,
    ImageToVideo,
}

impl TaskType {
    /// The reference's word.
    pub fn word(self) -> &'static str {
        match self {
            TaskType::TextToVideo => "t2v",
            TaskType::ImageToVideo => "i2v",
        }
    }
}

/// Everything an adapter may look at to prepare a model's inputs.
#[derive(Debug)]
pub struct FlowMatchingContext<'a> {
    /// `[B, C, (F,) H, W]` of `dtype`.
    pub noisy_latents: &'a Tensor,
    /// Clean latents of the same shape, of `dtype`.
    pub latents: &'a Tensor,
    /// `[B]` f32 in `[0, num_train_timesteps]`.
    pub timesteps: &'a Tensor,
    /// `[B]` f32 in `[0, 1]`.
    pub sigma: &'a Tensor,
    pub task_type: TaskType,
    pub data_type: DataType,
    pub device: Device,
    pub dtype: Kind,
    pub batch: &'a Batch,
    /// Probability with which the adapter itself drops conditions; 0 where the pipeline does it.
    pub cfg_dropout_prob: f64,
    /// What a model that embeds its guidance is fed; the adapter's own where there is none, as in training.
    pub guidance_scale: Option<f64>,
    /// The adapter's draws come after the pipeline's, from the same stream.
    pub draws: &'a Draws<'a>,
}

/// Turns noisy batches into a model family's inputs and its outputs into a prediction.
pub trait ModelAdapter {
    /// The batch's keys that hold conditions, which dropping replaces by zeros.
    fn condition_keys(&self) -> &'static [&'static str];

    /// The model's inputs, all constants.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if the batch lacks a key or its shapes do not fit the family.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations>;

    /// The predicted velocity in the latents' shape.
    fn prediction(&self, output: &Activations) -> Tensor;

    /// Loss of each element before weighting: the squared error in f32, unless a family knows better.
    fn compute_loss(&self, prediction: &Tensor, target: &Tensor) -> Tensor {
        (prediction.to_kind(Kind::Float) - target.to_kind(Kind::Float)).square()
    }

    /// Further scalar losses by name, added to the mean loss without its sigma weight.
    fn auxiliary_losses(&self, _output: &Activations) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    /// Noise levels for generating latents of this shape, `[C, (F,) H, W]`: evenly spaced with the run's shift, unless a family
    /// knows better.
    fn noise_levels(&self, _latents: &[i64], settings: &FlowMatchingSettings) -> NoiseLevels {
        NoiseLevels::even(Shift::Constant(settings.flow_shift))
    }

    /// What a guidance scale means to the family.
    fn guidance(&self) -> Guidance {
        Guidance::ClassifierFree
    }
}
