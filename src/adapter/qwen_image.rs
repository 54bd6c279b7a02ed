//! Qwen-Image: latents as tokens of 2 x 2 pixels, text.

use tch::Tensor;

use super::AdapterSettings;
use super::inputs::{
    TimestepDtype, guidance, packed, seen_text, text_key, text_mask_key, unpacked,
};
use crate::error::Result;
use crate::flow::time_shift::{ShiftType, TimeShift};
use crate::flow::{
    BatchKey, DropoutScope, FlowMatchingContext, FlowMatchingSettings, Guidance, ModelAdapter,
    NoiseLevels, Shift,
};
use crate::nn::Activations;
use crate::settings::settings;

const NAME: &str = "qwen_image";

settings! {
    /// `[flow_matching.adapter]` of `adapter_type = "qwen_image"`; defaults are the reference's.
    ///
    /// Source: NeMo AutoModel 0.5.0, `QwenImageAdapter`.
    pub struct QwenImage {
        /// Guidance scale that the model is told in training.
        pub guidance_scale: f64 = 3.5, in 0.0..=1000.0;
        /// Whether the guidance scale is passed; only models that embed it take it, no published
        /// one does.
        pub use_guidance_embeds: bool = false;
        /// Whether attention leaves out the padding that the batch's `text_mask` marks.
        pub use_text_mask: bool = false;
        /// Kind in which the model is told the timestep: the model's, or exactly.
        pub timestep_dtype: TimestepDtype = TimestepDtype::Compute;
    }
}

impl AdapterSettings for QwenImage {
    fn build(&self) -> Box<dyn ModelAdapter> {
        Box::new(self.clone())
    }
}

impl ModelAdapter for QwenImage {
    fn name(&self) -> &'static str {
        NAME
    }

    fn keys(&self) -> Vec<BatchKey> {
        [text_key()].into_iter().chain(self.use_text_mask.then(text_mask_key)).collect()
    }

    fn dropout(&self) -> Option<DropoutScope> {
        Some(DropoutScope::Batch)
    }

    fn provides(&self) -> &'static [&'static str] {
        const ALL: &[&str] =
            &["hidden_states", "encoder_hidden_states", "timestep", "grid", "guidance"];
        if self.use_guidance_embeds { ALL } else { &ALL[..ALL.len() - 1] }
    }

    /// `hidden_states` `[B, H/2 · W/2, 4·C]`, `encoder_hidden_states` `[B, L, D]`, `timestep` `[B]`
    /// in `[0, 1]`, `grid`; `guidance` `[B]` in the compute kind if it is used. If the text's mask
    /// is used, the text has the tokens that a sample sees, with their `text_places` `[L]` if they
    /// are not the first ones, and `text_mask` `[B, L]` if samples see different ones.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        let (tokens, grid) = packed(context, NAME)?;
        let text = seen_text(context, self.use_text_mask, NAME)?;
        let guidance = self
            .use_guidance_embeds
            .then(|| guidance(context, self.guidance_scale).to_kind(context.dtype));
        Ok(Activations::new()
            .with_constant("hidden_states", tokens)
            .with_constant("encoder_hidden_states", text.tokens)
            .with_constant("timestep", self.timestep_dtype.unit_timesteps(context))
            .with_constant("grid", grid)
            .with_optional("guidance", guidance)
            .with_optional("text_places", text.places)
            .with_optional("text_mask", text.mask))
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        unpacked(output)
    }

    /// Shifts further for more tokens; the last level before data is 0.02.
    fn noise_levels(
        &self,
        _latents: &[i64],
        image_tokens: i64,
        _settings: &FlowMatchingSettings,
        _guidance: Guidance,
    ) -> NoiseLevels {
        let rule = TimeShift { shift_type: ShiftType::QwenImage, ..TimeShift::default() };
        NoiseLevels::even(Shift::Constant(rule.shift(image_tokens))).ending_at(0.02)
    }

    fn guidance(&self, _model_embeds: bool) -> Guidance {
        Guidance::Rescaled { patch_size: 2 }
    }
}
