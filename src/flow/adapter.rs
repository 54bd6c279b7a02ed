//! What flow matching asks of a model family.

use tch::{Device, Kind, Reduction, Tensor};

use super::batch_keys::{BatchKey, Role, check_empty_row};
use super::guidance::Guidance;
use super::noise_levels::{NoiseLevels, Shift};
use super::settings::{CfgDropoutValue, FlowMatchingSettings};
use crate::data::{Batch, DataType, EMPTY};
use crate::error::{Error, Result};
use crate::nn::Activations;
use crate::rng::Draws;

/// What a video batch is trained to do; images are always text-to-video in the reference's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskType {
    TextToVideo,
    ImageToVideo,
    /// Drawn for each sample.
    Mixed,
}

impl TaskType {
    /// The reference's word; `mixed` is our own.
    pub fn word(self) -> &'static str {
        match self {
            TaskType::TextToVideo => "t2v",
            TaskType::ImageToVideo => "i2v",
            TaskType::Mixed => "mixed",
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
    /// `[B]` boolean: which samples are image-to-video.
    pub image_to_video: &'a Tensor,
    pub data_type: DataType,
    pub device: Device,
    pub dtype: Kind,
    pub batch: &'a Batch,
    /// Probability with which the adapter itself drops conditions; 0 where the pipeline does it.
    pub cfg_dropout_prob: f64,
    pub cfg_dropout_value: CfgDropoutValue,
    /// What a model that embeds its guidance is fed; the adapter's own where there is none, as in
    /// training.
    pub guidance_scale: Option<f64>,
    /// The adapter's draws come after the pipeline's, from the same stream.
    pub draws: &'a Draws<'a>,
}

impl FlowMatchingContext<'_> {
    /// A tensor of the batch, on the context's device.
    ///
    /// # Errors
    /// [`Error::Data`] naming `adapter` and the key if the batch lacks it.
    pub fn required(&self, key: &str, adapter: &str) -> Result<Tensor> {
        let missing = || Error::data("batch", format!("the {adapter} adapter needs `{key}`"));
        Ok(self.batch.get(key).ok_or_else(missing)?.to_device(self.device))
    }

    /// The batch's condition `key` with the rows that `drop` `[B]`, on the host, marks replaced, as
    /// `cfg_dropout_value` says.
    ///
    /// # Errors
    /// [`Error::Data`] if the empty prompt's is wanted and missing or unfit.
    pub fn dropped(&self, key: &str, condition: &Tensor, drop: &Tensor) -> Result<Tensor> {
        if self.cfg_dropout_prob <= 0.0 {
            return Ok(condition.shallow_clone());
        }
        dropped(self.batch, key, condition, drop, self.cfg_dropout_value)
    }

    /// The same of a condition's mask: it goes with the empty prompt, and stays where conditions
    /// become zeros.
    ///
    /// # Errors
    /// As [`dropped`](Self::dropped).
    pub fn dropped_mask(&self, key: &str, mask: &Tensor, drop: &Tensor) -> Result<Tensor> {
        match self.cfg_dropout_value {
            CfgDropoutValue::Zeros => Ok(mask.shallow_clone()),
            CfgDropoutValue::EmptyPrompt => self.dropped(key, mask, drop),
        }
    }
}

/// A condition with the rows that `drop` marks replaced: by zeros, or by the batch's `empty.<key>`,
/// right-padded with zeros.
///
/// # Shapes
/// `condition`: `[B, …]`; `drop`: `[B]` boolean on the host, where it was drawn; `empty.<key>`: a
/// row, its first axis no longer than the condition's. Returns the condition itself where nothing
/// is dropped, as in most batches.
///
/// # Errors
/// [`Error::Data`] if the empty prompt's row is wanted and missing or unfit.
pub(super) fn dropped(
    batch: &Batch,
    key: &str,
    condition: &Tensor,
    drop: &Tensor,
    value: CfgDropoutValue,
) -> Result<Tensor> {
    let empty = match value {
        CfgDropoutValue::Zeros => None,
        CfgDropoutValue::EmptyPrompt => Some(empty_row(batch, key, condition)?),
    };
    let drop = Vec::<bool>::try_from(drop).expect("one boolean a sample, on the host");
    if !drop.contains(&true) {
        return Ok(condition.shallow_clone());
    }
    let row = empty.unwrap_or_else(|| {
        Tensor::zeros(&condition.size()[1..], (condition.kind(), condition.device()))
    });
    let after = condition.copy();
    (0..)
        .zip(drop)
        .filter(|(_, dropped)| *dropped)
        .for_each(|(sample, _)| after.get(sample).copy_(&row));
    Ok(after)
}

/// `empty.<key>` as a row of `condition`.
fn empty_row(batch: &Batch, key: &str, condition: &Tensor) -> Result<Tensor> {
    let name = format!("{EMPTY}{key}");
    let missing = || {
        Error::data(
            "batch",
            format!("cfg_dropout_value is \"empty_prompt\" and the data have no `{name}`"),
        )
    };
    let empty = batch.get(&name).ok_or_else(missing)?;
    let (found, row) = (empty.size(), condition.size()[1..].to_vec());
    check_empty_row(key, &found, &row).map_err(|what| Error::data("batch", what))?;
    let mut whole = Tensor::zeros(&row, (condition.kind(), condition.device()));
    match found.first() {
        Some(&length) => whole.narrow(0, 0, length).copy_(empty),
        None => whole.copy_(empty),
    }
    Ok(whole)
}

/// Turns noisy batches into a model family's inputs and its outputs into a prediction.
pub trait ModelAdapter {
    /// The adapter's name in a configuration.
    fn name(&self) -> &'static str;

    /// The tensors that it reads of a batch, besides latents and `loss_mask`.
    fn keys(&self) -> Vec<BatchKey>;

    /// The batch's keys that hold conditions, which can be dropped.
    fn condition_keys(&self) -> Vec<&'static str> {
        self.keys()
            .into_iter()
            .filter(|key| key.role == Role::Condition)
            .flat_map(|key| key.names)
            .copied()
            .collect()
    }

    /// True for an adapter that drops conditions itself, in the reference's way, where the pipeline
    /// does not.
    fn drops_conditions(&self) -> bool {
        false
    }

    /// A line on what its settings mean for a model that embeds a guidance scale, or does not,
    /// where that may surprise.
    fn notes(&self, _model_embeds_guidance: bool) -> Option<String> {
        None
    }

    /// Names of the inputs that [`prepare_inputs`](Self::prepare_inputs) gives to every model that
    /// has a use for them.
    fn provides(&self) -> &'static [&'static str];

    /// The model's inputs, all constants.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch lacks a key or its shapes do not fit the family.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations>;

    /// The predicted velocity in the latents' shape.
    fn prediction(&self, output: &Activations) -> Tensor;

    /// Loss of each element before weighting: the squared error in f32, unless a family knows
    /// better.
    fn compute_loss(&self, prediction: &Tensor, target: &Tensor) -> Tensor {
        prediction.to_kind(Kind::Float).mse_loss(&target.to_kind(Kind::Float), Reduction::None)
    }

    /// Elements that the mean loss is taken over, if not all: of the prediction's rank and
    /// broadcastable to it, 1 where an element counts.
    fn loss_mask(&self, _output: &Activations) -> Option<Tensor> {
        None
    }

    /// Further scalar losses by name, added to the mean loss without its sigma weight; each the
    /// batch's mean.
    fn auxiliary_losses(&self, _output: &Activations) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    /// Noise levels for generating latents of this shape, `[C, (F,) H, W]`: evenly spaced with the
    /// run's shift, unless a family knows better. `guidance`: what [`guidance`](Self::guidance)
    /// said.
    fn noise_levels(
        &self,
        _latents: &[i64],
        settings: &FlowMatchingSettings,
        _guidance: Guidance,
    ) -> NoiseLevels {
        NoiseLevels::even(Shift::Constant(settings.flow_shift))
    }

    /// What a guidance scale means to the family's models, of which some embed it and some do not.
    fn guidance(&self, _model_embeds: bool) -> Guidance {
        Guidance::ClassifierFree
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn batch(empty: Option<Tensor>) -> Batch {
        let tensors: BTreeMap<_, _> =
            empty.into_iter().map(|tensor| ("empty.text_embeddings".to_string(), tensor)).collect();
        Batch { tensors, data_type: DataType::Image, sample_ids: Vec::new(), bad_samples: 0 }
    }

    fn after(empty: Option<Tensor>, value: CfgDropoutValue) -> Result<Tensor> {
        let (text, drop) =
            (Tensor::full([2, 4, 3], 7.0, FLOAT), Tensor::from_slice(&[false, true]));
        dropped(&batch(empty), "text_embeddings", &text, &drop, value)
    }

    #[test]
    fn a_dropped_row_becomes_zeros_or_the_empty_prompt_and_others_stay() {
        let zeros = after(None, CfgDropoutValue::Zeros).expect("zeros need nothing");
        assert!(
            zeros.get(0).eq(7.0).all().int64_value(&[]) == 1
                && zeros.get(1).count_nonzero(0).sum(Kind::Int64).int64_value(&[]) == 0
        );
        let empty = after(Some(Tensor::full([2, 3], 5.0, FLOAT)), CfgDropoutValue::EmptyPrompt)
            .expect("a shorter prompt");
        assert!(empty.get(0).eq(7.0).all().int64_value(&[]) == 1);
        assert!(
            empty.get(1).equal(&Tensor::cat(
                &[Tensor::full([2, 3], 5.0, FLOAT), Tensor::zeros([2, 3], FLOAT)],
                0
            )),
            "padded with zeros"
        );
    }

    #[test]
    fn an_empty_prompt_that_is_missing_or_unfit_is_refused() {
        let refusal =
            |empty| after(empty, CfgDropoutValue::EmptyPrompt).expect_err("refused").to_string();
        assert_eq!(
            refusal(None),
            "batch: cfg_dropout_value is \"empty_prompt\" and the data have no `empty.text_embeddings`"
        );
        for size in [[5i64, 3].as_slice(), &[4, 2], &[3]] {
            let text = refusal(Some(Tensor::zeros(size, FLOAT)));
            let expected = format!(
                "`empty.text_embeddings` {size:?} is no row of `text_embeddings`, which is [4, 3] a sample"
            );
            assert!(text.contains(&expected), "{text}");
        }
    }
}
