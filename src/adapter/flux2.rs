//! FLUX.2: latents that are already patched, one token for each pixel, text, guidance.

use tch::Tensor;

use super::AdapterSettings;
use super::inputs::{TimestepDtype, guidance, sides, text_embeddings, text_key};
use crate::error::Result;
use crate::flow::{
    BatchKey, DropoutScope, FlowMatchingContext, FlowMatchingSettings, Guidance, ModelAdapter,
    NoiseLevels, Shift,
};
use crate::nn::Activations;
use crate::nn::patches::{cut_images, join_images};
use crate::settings::settings;

const NAME: &str = "flux2";

settings! {
    /// `[flow_matching.adapter]` of `adapter_type = "flux2"`; defaults are the reference's.
    ///
    /// Source: NeMo AutoModel 0.5.0, `Flux2Adapter`.
    pub struct Flux2 {
        /// Guidance scale that the model is told in training.
        pub guidance_scale: f64 = 3.5, in 0.0..=1000.0;
        /// Whether the guidance scale is passed; only models that embed it take it.
        pub use_guidance_embeds: bool = true;
        /// Kind in which the model is told the timestep: the model's, or exactly.
        pub timestep_dtype: TimestepDtype = TimestepDtype::Compute;
    }
}

impl AdapterSettings for Flux2 {
    fn build(&self) -> Box<dyn ModelAdapter> {
        Box::new(self.clone())
    }
}

impl ModelAdapter for Flux2 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn keys(&self) -> Vec<BatchKey> {
        vec![text_key()]
    }

    fn dropout(&self) -> Option<DropoutScope> {
        Some(DropoutScope::Sample)
    }

    fn notes(&self, model_embeds_guidance: bool) -> Option<String> {
        let without = model_embeds_guidance && !self.use_guidance_embeds;
        without.then(|| {
            "use_guidance_embeds = false: the model embeds a guidance scale and is told none".into()
        })
    }

    fn provides(&self) -> &'static [&'static str] {
        const ALL: &[&str] =
            &["hidden_states", "encoder_hidden_states", "timestep", "grid", "guidance"];
        if self.use_guidance_embeds { ALL } else { &ALL[..ALL.len() - 1] }
    }

    /// `hidden_states` `[B, H · W, C]`, `encoder_hidden_states` `[B, L, D]`, `timestep` `[B]` in
    /// `[0, 1]`, `grid`, `guidance` `[B]` f32 if it is used.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        let ([height, width], text) = (sides(context, NAME)?, text_embeddings(context, NAME)?);
        let inputs = Activations::new()
            .with_constant("hidden_states", cut_images(context.noisy_latents, 1))
            .with_constant("encoder_hidden_states", context.dropped("text_embeddings", &text)?)
            .with_constant("timestep", self.timestep_dtype.unit_timesteps(context))
            .with_constant("grid", Tensor::from_slice(&[1, height, width]));
        if self.use_guidance_embeds {
            Ok(inputs.with_constant("guidance", guidance(context, self.guidance_scale)))
        } else {
            Ok(inputs)
        }
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        let grid = Vec::<i64>::try_from(output.get("grid")).expect("grid: integers");
        join_images(output.get("prediction"), 1, grid[1], grid[2])
    }

    /// Shifts by FLUX.2's fit over the number of tokens and steps.
    fn noise_levels(
        &self,
        _latents: &[i64],
        image_tokens: i64,
        _settings: &FlowMatchingSettings,
        _guidance: Guidance,
    ) -> NoiseLevels {
        NoiseLevels::even(Shift::Empirical { tokens: image_tokens })
    }

    fn guidance(&self, model_embeds: bool) -> Guidance {
        if model_embeds && self.use_guidance_embeds {
            Guidance::Embedded
        } else {
            Guidance::ClassifierFree
        }
    }
}
