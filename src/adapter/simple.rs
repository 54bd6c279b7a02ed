//! Latents, timestep and text as they are: Wan, and every model that takes these three.

use tch::Tensor;

use super::AdapterSettings;
use crate::error::{Error, Result};
use crate::flow::{FlowMatchingContext, ModelAdapter};
use crate::nn::Activations;
use crate::settings::{Keys, Settings};

/// Source: NeMo AutoModel 0.5.0, `SimpleAdapter`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Simple {}

impl Settings for Simple {
    fn visit(&mut self, _keys: &mut Keys<'_>) {}
}

impl AdapterSettings for Simple {
    fn build(&self) -> Box<dyn ModelAdapter> {
        Box::new(self.clone())
    }
}

impl ModelAdapter for Simple {
    fn condition_keys(&self) -> &'static [&'static str] {
        &["text_embeddings"]
    }

    /// `hidden_states` as the noisy latents, `timestep` `[B]` in the compute kind on the scale of the training timesteps,
    /// `encoder_hidden_states` `[B, L, D]`.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        let missing = || Error::data("batch", "the simple adapter needs `text_embeddings`");
        let text = context.batch.get("text_embeddings").ok_or_else(missing)?.to_device(context.device).to_kind(context.dtype);
        let text = if text.dim() == 2 { text.unsqueeze(0) } else { text };
        Ok(Activations::new()
            .with_constant("hidden_states", context.noisy_latents.shallow_clone())
            .with_constant("timestep", context.timesteps.to_kind(context.dtype))
            .with_constant("encoder_hidden_states", text))
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        output.get("prediction").shallow_clone()
    }
}
