//! Latents, timestep and text as they are: Wan, and every model that takes these three.

use tch::Tensor;

use super::AdapterSettings;
use super::inputs::{TimestepDtype, text_embeddings};
use crate::error::Result;
use crate::flow::{FlowMatchingContext, FlowMatchingSettings, ModelAdapter, NoiseLevels, Shift};
use crate::nn::Activations;
use crate::settings::{Keys, Settings};

/// Source: NeMo AutoModel 0.5.0, `SimpleAdapter`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Simple {
    pub timestep_dtype: TimestepDtype,
}

impl Settings for Simple {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        self.timestep_dtype.visit(keys);
    }
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

    fn provides(&self) -> &'static [&'static str] {
        &["hidden_states", "timestep", "encoder_hidden_states"]
    }

    /// `hidden_states` as the noisy latents, `timestep` `[B]` on the scale of the training timesteps, `encoder_hidden_states`
    /// `[B, L, D]`.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        Ok(Activations::new()
            .with_constant("hidden_states", context.noisy_latents.shallow_clone())
            .with_constant("timestep", self.timestep_dtype.of_a_thousand(context))
            .with_constant("encoder_hidden_states", text_embeddings(context, "simple")?))
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        output.get("prediction").shallow_clone()
    }

    /// Videos as Wan's pipeline generates them, down to the smallest timestep that training knows; images evenly.
    fn noise_levels(&self, latents: &[i64], settings: &FlowMatchingSettings) -> NoiseLevels {
        match latents.len() {
            4 => NoiseLevels::down_to_training(settings.flow_shift, settings.num_train_timesteps),
            _ => NoiseLevels::even(Shift::Constant(settings.flow_shift)),
        }
    }
}
