//! Latents, timestep and text without conversion: for Wan, and every model that takes these three.

use tch::Tensor;

use super::inputs::{TimestepDtype, batched, text_embeddings, text_key};
use super::{AdapterSettings, Need};
use crate::error::{Error, Result};
use crate::flow::{
    BatchKey, FlowMatchingContext, FlowMatchingSettings, Guidance, ModelAdapter, NoiseLevels, Role,
    Shift, Solver,
};
use crate::model::Model;
use crate::nn::Activations;
use crate::settings::{Family, settings};

/// Inputs that `image_conditioning` adds.
const IMAGE_INPUTS: [&str; 2] = ["condition_latents", "encoder_hidden_states_image"];

const NAME: &str = "simple";

settings! {
    /// `[flow_matching.adapter]` of `adapter_type = "simple"`; defaults are the reference's.
    ///
    /// Source: NeMo AutoModel 0.5.0, `SimpleAdapter`; conditioning on images is our own.
    pub struct Simple {
        /// Whether the model is given the batch's `condition_latents`, and `image_embeds` if there
        /// are any (Wan I2V).
        pub image_conditioning: bool = false;
        /// Kind in which the model is told the timestep: the model's, or exactly.
        pub timestep_dtype: TimestepDtype = TimestepDtype::Compute;
    }
}

impl AdapterSettings for Simple {
    fn build(&self) -> Box<dyn ModelAdapter> {
        Box::new(self.clone())
    }

    fn needs(&self, model: &Model) -> Vec<Need> {
        let takes_images = model.inputs().iter().any(|input| IMAGE_INPUTS.contains(input));
        if takes_images == self.image_conditioning {
            return Vec::new();
        }
        let not = if takes_images { "" } else { "not " };
        let why = format!(
            "is {}, the model `{}` is {not}conditioned on images",
            self.image_conditioning,
            model.name()
        );
        vec![Need { key: "image_conditioning", value: takes_images.to_string(), why }]
    }
}

impl ModelAdapter for Simple {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Only the text is a condition: the image stays known when guidance drops the prompt.
    fn keys(&self) -> Vec<BatchKey> {
        let latents = BatchKey::required(
            Role::Fixed,
            &["condition_latents"],
            &[&["Cc", "F", "H", "W"], &["Cc", "H", "W"]],
        );
        let forms: &[&[&str]] = &[&["Li", "Di"], &["images", "Li", "Di"]];
        let embeds = BatchKey::optional(
            Role::Fixed,
            &["image_embeds"],
            forms,
            "no tokens of an image, which only Wan 2.1's models take".into(),
        );
        let images = if self.image_conditioning { vec![latents, embeds] } else { Vec::new() };
        [vec![text_key()], images].concat()
    }

    fn provides(&self) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "condition_latents",
            "encoder_hidden_states_image",
        ];
        if self.image_conditioning { ALL } else { &ALL[..3] }
    }

    /// `hidden_states` as the noisy latents, `timestep` `[B]` on the scale of the training
    /// timesteps, `encoder_hidden_states` `[B, L, D]`; with images `condition_latents` `[B, Cc, F,
    /// H, W]` and, if the batch has it, `encoder_hidden_states_image` `[B, Li, Di]`.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        let inputs = Activations::new()
            .with_constant("hidden_states", context.noisy_latents.shallow_clone())
            .with_constant("timestep", self.timestep_dtype.training_timesteps(context))
            .with_constant("encoder_hidden_states", text_embeddings(context, NAME)?);
        if !self.image_conditioning {
            return Ok(inputs);
        }
        let inputs = inputs.with_constant("condition_latents", condition_latents(context)?);
        Ok(match image_embeds(context)? {
            Some(image) => inputs.with_constant("encoder_hidden_states_image", image),
            None => inputs,
        })
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        output.get("prediction").shallow_clone()
    }

    /// Returns for videos the levels of Wan's published pipelines, made for UniPC; for images even
    /// ones.
    fn noise_levels(
        &self,
        latents: &[i64],
        image_tokens: i64,
        settings: &FlowMatchingSettings,
        _guidance: Guidance,
    ) -> NoiseLevels {
        let shift = settings.shift(image_tokens);
        match latents.len() {
            4 => NoiseLevels::down_to_training(shift).with_solver(Solver::UniPc),
            _ => NoiseLevels::even(Shift::Constant(shift)),
        }
    }
}

/// Returns `condition_latents` `[B, Cc, F, H, W]` in the compute kind.
fn condition_latents(context: &FlowMatchingContext<'_>) -> Result<Tensor> {
    let latents = context.noisy_latents.size();
    let condition = batched(context, "condition_latents", NAME, latents.len())?;
    if condition.size()[2..] != latents[2..] {
        let what = format!(
            "`condition_latents` {:?} must have the size of the latents {latents:?} but for the channels",
            condition.size()
        );
        return Err(Error::data("batch", what));
    }
    Ok(condition)
}

/// Returns `image_embeds` `[B, Li, Di]` in the compute kind; several images of a sample may also be
/// given as consecutive rows.
fn image_embeds(context: &FlowMatchingContext<'_>) -> Result<Option<Tensor>> {
    let Some(found) = context.batch.get("image_embeds") else { return Ok(None) };
    let (size, samples) = (found.size(), context.noisy_latents.size()[0]);
    match *size.as_slice() {
        [rows, _, .., width] if rows >= samples && rows % samples == 0 => Ok(Some(
            found.to_device(context.device).to_kind(context.dtype).reshape([samples, -1, width]),
        )),
        _ => {
            let what = format!(
                "`image_embeds` {size:?} must be tokens [B, L, D] of the latents' {samples} samples"
            );
            Err(Error::data("batch", what))
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::adapter::inputs::tests::prepared as inputs_of;
    use crate::data::{Batch, DataType};

    const CONDITIONED: Simple =
        Simple { image_conditioning: true, timestep_dtype: TimestepDtype::Compute };

    /// Returns the inputs that `adapter` prepares from two noisy videos of 4 channels and 3 x 2 x
    /// 6, in bfloat16.
    fn prepared(adapter: &Simple, sizes: &[(&str, &[i64])]) -> Result<Activations> {
        let tensor = |size: &[i64]| {
            Tensor::arange(size.iter().product::<i64>(), (Kind::Float, Device::Cpu)).reshape(size)
        };
        let tensors = sizes.iter().map(|(key, size)| (key.to_string(), tensor(size))).collect();
        let batch =
            Batch { tensors, data_type: DataType::Video, sample_ids: Vec::new(), bad_samples: 0 };
        let latents = Tensor::zeros([2, 4, 3, 2, 6], (Kind::BFloat16, Device::Cpu));
        inputs_of(adapter, &batch, &latents, &[0.25, 0.5], &[false, false])
    }

    #[test]
    fn inputs_are_those_that_are_promised() {
        let sizes: [(&str, &[i64]); 3] = [
            ("text_embeddings", &[2, 5, 8]),
            ("condition_latents", &[2, 7, 3, 2, 6]),
            ("image_embeds", &[4, 3, 5]),
        ];
        for adapter in [Simple::default(), CONDITIONED] {
            assert_eq!(prepared(&adapter, &sizes).expect("fit").names(), adapter.provides());
        }
        let inputs = prepared(&CONDITIONED, &sizes).expect("fit");
        assert_eq!(inputs.get("condition_latents").kind(), Kind::BFloat16);
        // Rows 0 and 1 are the first sample's images.
        let image = inputs.get("encoder_hidden_states_image");
        assert_eq!((image.size(), image.double_value(&[0, 3, 0])), (vec![2, 6, 5], 15.0));
    }

    #[test]
    fn an_unfit_condition_is_refused_by_name() {
        let refusal = |sizes: &[(&str, &[i64])]| {
            let sizes = [&[("text_embeddings", [2i64, 5, 8].as_slice())], sizes].concat();
            prepared(&CONDITIONED, &sizes).expect_err("unfit").to_string()
        };
        let condition: (&str, &[i64]) = ("condition_latents", &[2, 7, 3, 2, 6]);
        assert_eq!(refusal(&[]), "batch: the simple adapter needs `condition_latents`");
        assert!(
            refusal(&[("condition_latents", &[2, 7, 3, 2, 5])])
                .contains("must have the size of the latents [2, 4, 3, 2, 6]")
        );
        for size in [[3i64, 3, 5].as_slice(), &[1, 3, 5], &[2, 5]] {
            let message = refusal(&[condition, ("image_embeds", size)]);
            assert!(
                message.contains(&format!("`image_embeds` {size:?} must be tokens")),
                "{message}"
            );
        }
    }
}
