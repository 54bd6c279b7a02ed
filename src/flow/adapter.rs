//! The interface between flow matching and a model family.

use tch::{Device, Kind, Tensor};

use super::batch_keys::{BatchKey, Role, check_empty_row};
use super::settings::{CfgDropoutValue, FlowMatchingSettings};
use super::trajectory::{Guidance, NoiseLevels, Shift};
use crate::data::{Batch, DataType, EMPTY};
use crate::error::{Error, Result};
use crate::nn::Activations;
use crate::ops::{SquaredError, apply};
use crate::tensor::broadcast_to_rank;

/// The task of a video batch; images are always text-to-video in the reference's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskType {
    TextToVideo,
    ImageToVideo,
    /// Drawn for each sample.
    Mixed,
}

impl TaskType {
    /// Returns the reference's word; `mixed` is our own.
    pub fn word(self) -> &'static str {
        match self {
            TaskType::TextToVideo => "t2v",
            TaskType::ImageToVideo => "i2v",
            TaskType::Mixed => "mixed",
        }
    }
}

/// Samples whose conditions one draw drops or keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropoutScope {
    /// Each sample by itself.
    Sample,
    /// A whole batch, by a coin that libtorch's generator does not toss; each sample by itself if
    /// its draws are keyed by sample.
    Batch,
}

/// The inputs from which an adapter prepares a model's inputs.
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
    /// `[B]` boolean on the host, where it was drawn: true for image-to-video samples.
    pub image_to_video: &'a Tensor,
    pub data_type: DataType,
    pub device: Device,
    pub dtype: Kind,
    pub batch: &'a Batch,
    /// `[B]` boolean: true for samples whose conditions the adapter drops; `None` if it drops none.
    pub drop: Option<&'a Tensor>,
    pub cfg_dropout_value: CfgDropoutValue,
    /// Guidance scale for a model that embeds it; `None` selects the adapter's own, as in training.
    pub guidance_scale: Option<f64>,
}

impl<'a> FlowMatchingContext<'a> {
    /// Returns a tensor of the batch, on the host.
    ///
    /// # Errors
    /// [`Error::Data`] naming `adapter` and the key if the batch lacks it.
    pub fn required(&self, key: &str, adapter: &str) -> Result<&'a Tensor> {
        let missing = || Error::data("batch", format!("the {adapter} adapter needs `{key}`"));
        self.batch.get(key).ok_or_else(missing)
    }

    /// Returns the batch's condition `key` with the rows of dropped samples replaced;
    /// `cfg_dropout_value` selects the replacement.
    ///
    /// # Errors
    /// [`Error::Data`] if the empty prompt's condition is needed and is missing or does not fit.
    pub fn dropped(&self, key: &str, condition: &Tensor) -> Result<Tensor> {
        match self.drop {
            Some(drop) => dropped(self.batch, key, condition, drop, self.cfg_dropout_value),
            None => Ok(condition.shallow_clone()),
        }
    }

    /// Does the same for a condition's mask, which changes only if the empty prompt replaces
    /// conditions, not if zeros do.
    ///
    /// # Errors
    /// As [`dropped`](Self::dropped).
    pub fn dropped_mask(&self, key: &str, mask: &Tensor) -> Result<Tensor> {
        match self.cfg_dropout_value {
            CfgDropoutValue::Zeros => Ok(mask.shallow_clone()),
            CfgDropoutValue::EmptyPrompt => self.dropped(key, mask),
        }
    }
}

/// Replaces the rows of a condition that `drop` marks: by zeros, or by the batch's `empty.<key>`,
/// right-padded with zeros.
///
/// # Shapes
/// `condition`: `[B, …]`; `drop`: `[B]` boolean; `empty.<key>`: a row, its first axis at most as
/// long as the condition's. Returns the condition itself if marks on the host drop nothing, as in
/// most batches; marks on a GPU are not read for a condition there, which would wait for its queue.
///
/// # Errors
/// [`Error::Data`] if the empty prompt's row is needed and is missing or does not fit.
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
    if drop.device() == Device::Cpu && drop.any().int64_value(&[]) == 0 {
        return Ok(condition.shallow_clone());
    }
    let row = empty.unwrap_or_else(|| {
        Tensor::zeros(&condition.size()[1..], (condition.kind(), condition.device()))
    });
    let drop = broadcast_to_rank(&drop.to_device(condition.device()), condition.dim());
    Ok(row.where_self(&drop, condition))
}

/// Returns `empty.<key>` as a row of `condition`.
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

/// Converts noisy batches to a model family's inputs, and its outputs to a prediction.
pub trait ModelAdapter {
    /// The adapter's name in a configuration.
    fn name(&self) -> &'static str;

    /// Returns the tensors that the adapter reads from a batch, besides latents and `loss_mask`.
    fn keys(&self) -> Vec<BatchKey>;

    /// Returns the batch's keys of conditions, which can be dropped.
    fn condition_keys(&self) -> Vec<&'static str> {
        self.keys()
            .into_iter()
            .filter(|key| key.role == Role::Condition)
            .flat_map(|key| key.names)
            .copied()
            .collect()
    }

    /// Returns the samples that share one draw where the adapter itself drops conditions, as the
    /// reference does, unless the pipeline drops them; `None` if it drops none.
    fn dropout(&self) -> Option<DropoutScope> {
        None
    }

    /// Returns the batch's key of tokens that only image-to-video samples see, and they only if the
    /// tokens are not zeros.
    fn image_tokens(&self) -> Option<&'static str> {
        None
    }

    /// True if the model is given the known first frame of image-to-video samples.
    fn takes_first_frame(&self) -> bool {
        false
    }

    /// Returns a line about the effect of the adapter's settings on a model that embeds a guidance
    /// scale, or does not, if that may be unexpected.
    fn notes(&self, _model_embeds_guidance: bool) -> Option<String> {
        None
    }

    /// Returns the names of the inputs that [`prepare_inputs`](Self::prepare_inputs) provides to
    /// every model that uses them.
    fn provides(&self) -> &'static [&'static str];

    /// Returns the model's inputs, all constants.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch lacks a key or its shapes do not fit the family.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations>;

    /// Returns the predicted velocity in the latents' shape.
    fn prediction(&self, output: &Activations) -> Tensor;

    /// Returns the loss of each element before weighting: the squared error in f32, unless a family
    /// overrides it. `target` is in f32.
    fn compute_loss(&self, prediction: &Tensor, target: &Tensor) -> Tensor {
        apply(SquaredError, [prediction, target])
    }

    /// Returns a mask of the elements in the mean loss; `None` for all. It has the prediction's
    /// rank, is broadcastable to it, and is 1 where an element counts.
    fn loss_mask(&self, _output: &Activations) -> Option<Tensor> {
        None
    }

    /// Returns further scalar losses by name, each the batch's mean, which are added to the mean
    /// loss without its sigma weight.
    fn auxiliary_losses(&self, _output: &Activations) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    /// Returns noise levels for generating latents of this shape, `[C, (F,) H, W]`, and number of
    /// image tokens: evenly spaced with the run's shift, unless a family overrides it. `guidance`:
    /// the result of [`guidance`](Self::guidance).
    fn noise_levels(
        &self,
        _latents: &[i64],
        image_tokens: i64,
        settings: &FlowMatchingSettings,
        _guidance: Guidance,
    ) -> NoiseLevels {
        NoiseLevels::even(Shift::Constant(settings.shift(image_tokens)))
    }

    /// Returns the meaning of a guidance scale for the family's models, some of which embed it.
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
