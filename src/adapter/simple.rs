//! Latents, timestep and text as they are: Wan, and every model that takes these three.

use tch::Tensor;

use super::AdapterSettings;
use super::inputs::{TimestepDtype, batched, text_embeddings};
use crate::error::{Error, Result};
use crate::flow::{FlowMatchingContext, ModelAdapter};
use crate::nn::Activations;
use crate::settings::{Keys, Settings};

/// Source: NeMo AutoModel 0.5.0, `SimpleAdapter`; conditioning on images is our own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Simple {
    pub image_conditioning: bool,
    pub timestep_dtype: TimestepDtype,
}

impl Settings for Simple {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        let doc = "Whether the model is given the batch's `condition_latents`, and `image_embeds` if there are any (Wan I2V).";
        keys.flag("image_conditioning", &mut self.image_conditioning, doc);
        self.timestep_dtype.visit(keys);
    }
}

impl AdapterSettings for Simple {
    fn build(&self) -> Box<dyn ModelAdapter> {
        Box::new(self.clone())
    }
}

impl ModelAdapter for Simple {
    /// The text alone: the image stays known where guidance leaves the prompt out.
    fn condition_keys(&self) -> &'static [&'static str] {
        &["text_embeddings"]
    }

    fn provides(&self) -> &'static [&'static str] {
        const ALL: &[&str] = &["hidden_states", "timestep", "encoder_hidden_states", "condition_latents", "encoder_hidden_states_image"];
        if self.image_conditioning { ALL } else { &ALL[..3] }
    }

    /// `hidden_states` as the noisy latents, `timestep` `[B]` on the scale of the training timesteps, `encoder_hidden_states`
    /// `[B, L, D]`; with images `condition_latents` `[B, Cc, F, H, W]` and, if the batch has it,
    /// `encoder_hidden_states_image` `[B, Li, Di]`.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        let inputs = Activations::new()
            .with_constant("hidden_states", context.noisy_latents.shallow_clone())
            .with_constant("timestep", self.timestep_dtype.of_a_thousand(context))
            .with_constant("encoder_hidden_states", text_embeddings(context, "simple")?);
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
}

/// `condition_latents` `[B, Cc, F, H, W]` in the compute kind.
fn condition_latents(context: &FlowMatchingContext<'_>) -> Result<Tensor> {
    let latents = context.noisy_latents.size();
    let condition = batched(context, "condition_latents", "simple", latents.len())?;
    if condition.size()[2..] != latents[2..] {
        let what = format!("`condition_latents` {:?} must have the size of the latents {latents:?} but for the channels", condition.size());
        return Err(Error::data("batch", what));
    }
    Ok(condition)
}

/// `image_embeds` `[B, Li, Di]` in the compute kind; several images of a sample may also stand in rows of their own, one
/// after another.
fn image_embeds(context: &FlowMatchingContext<'_>) -> Result<Option<Tensor>> {
    let Some(found) = context.batch.get("image_embeds") else { return Ok(None) };
    let (size, samples) = (found.size(), context.noisy_latents.size()[0]);
    match *size.as_slice() {
        [rows, _, .., width] if rows >= samples && rows % samples == 0 => {
            Ok(Some(found.to_device(context.device).to_kind(context.dtype).reshape([samples, -1, width])))
        }
        _ => {
            let what = format!("`image_embeds` {size:?} must be tokens [B, L, D] of the latents' {samples} samples");
            Err(Error::data("batch", what))
        }
    }
}
