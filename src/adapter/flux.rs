//! FLUX.1: latents as tokens of 2 x 2 pixels, text, pooled text, guidance.

use tch::Tensor;

use super::AdapterSettings;
use super::inputs::{
    TimestepDtype, batched, guidance, packed, seen_text, text_key, text_mask_key, unpacked,
};
use crate::error::Result;
use crate::flow::time_shift::{ShiftType, TimeShift};
use crate::flow::{
    BatchKey, DropoutScope, FlowMatchingContext, FlowMatchingSettings, Guidance, ModelAdapter,
    NoiseLevels, Role, Shift,
};
use crate::nn::Activations;
use crate::settings::settings;

const NAME: &str = "flux";

/// Alternative keys of the pooled text.
const POOLED_KEYS: [&str; 2] = ["pooled_prompt_embeds", "clip_pooled"];

/// Width of the zeros that replace missing pooled text: CLIP-L's.
const POOLED_WIDTH: i64 = 768;

settings! {
    /// `[flow_matching.adapter]` of `adapter_type = "flux"`; defaults are the reference's.
    ///
    /// Source: NeMo AutoModel 0.5.0, `FluxAdapter`.
    pub struct Flux {
        /// Guidance scale that the model is told in training.
        pub guidance_scale: f64 = 3.5, in 0.0..=1000.0;
        /// The reference's flag, which changes nothing, as there: models that embed the guidance
        /// scale need it, others take none.
        pub use_guidance_embeds: bool = true;
        /// Whether attention leaves out the padding that the batch's `text_mask` marks.
        pub use_text_mask: bool = false;
        /// Kind in which the model is told the timestep: the model's, or exactly.
        pub timestep_dtype: TimestepDtype = TimestepDtype::Compute;
    }
}

impl AdapterSettings for Flux {
    fn build(&self) -> Box<dyn ModelAdapter> {
        Box::new(self.clone())
    }
}

impl ModelAdapter for Flux {
    fn name(&self) -> &'static str {
        NAME
    }

    fn keys(&self) -> Vec<BatchKey> {
        let pooled = BatchKey::optional(
            Role::Condition,
            &POOLED_KEYS,
            &[&["P"]],
            format!("zeros [{POOLED_WIDTH}]"),
        );
        [text_key(), pooled].into_iter().chain(self.use_text_mask.then(text_mask_key)).collect()
    }

    fn dropout(&self) -> Option<DropoutScope> {
        Some(DropoutScope::Sample)
    }

    fn notes(&self, model_embeds_guidance: bool) -> Option<String> {
        let without_effect = model_embeds_guidance && !self.use_guidance_embeds;
        without_effect.then(|| {
            let scale = self.guidance_scale;
            format!("use_guidance_embeds = false changes nothing: the model embeds its guidance and is told guidance_scale = {scale}")
        })
    }

    fn provides(&self) -> &'static [&'static str] {
        &[
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "grid",
            "guidance",
        ]
    }

    /// `hidden_states` `[B, H/2 · W/2, 4·C]`, `encoder_hidden_states` `[B, L, D]`,
    /// `pooled_projections` `[B, P]`, `timestep` `[B]` in `[0, 1]`, `guidance` `[B]` f32, `grid`.
    /// If the text's mask is used, the text has the tokens that a sample sees, with their
    /// `text_places` `[L]` if they are not the first ones, and `text_mask` `[B, L]` if samples see
    /// different ones.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        let (tokens, grid) = packed(context, NAME)?;
        let text = seen_text(context, self.use_text_mask, NAME)?;
        Ok(Activations::new()
            .with_constant("hidden_states", tokens)
            .with_constant("encoder_hidden_states", text.tokens)
            .with_constant("pooled_projections", pooled(context)?)
            .with_constant("timestep", self.timestep_dtype.unit_timesteps(context))
            .with_constant("guidance", guidance(context, self.guidance_scale))
            .with_constant("grid", grid)
            .with_optional("text_places", text.places)
            .with_optional("text_mask", text.mask))
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        unpacked(output)
    }

    /// Shifts further for more tokens if guidance is embedded (dev), and not at all otherwise
    /// (schnell).
    fn noise_levels(
        &self,
        _latents: &[i64],
        image_tokens: i64,
        _settings: &FlowMatchingSettings,
        guidance: Guidance,
    ) -> NoiseLevels {
        let rule = TimeShift { shift_type: ShiftType::Flux, ..TimeShift::default() };
        let shift = if guidance == Guidance::Embedded { rule.shift(image_tokens) } else { 1.0 };
        NoiseLevels::even(Shift::Constant(shift))
    }

    fn guidance(&self, model_embeds: bool) -> Guidance {
        if model_embeds { Guidance::Embedded } else { Guidance::ClassifierFree }
    }
}

/// Returns pooled text `[B, P]`, zeros if the batch has none.
fn pooled(context: &FlowMatchingContext<'_>) -> Result<Tensor> {
    match POOLED_KEYS.into_iter().find(|key| context.batch.get(key).is_some()) {
        Some(key) => context.dropped(key, &batched(context, key, NAME, 2)?),
        None => Ok(Tensor::zeros(
            [context.noisy_latents.size()[0], POOLED_WIDTH],
            (context.dtype, context.device),
        )),
    }
}
