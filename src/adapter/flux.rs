//! FLUX.1: latents in tokens of 2 x 2 pixels, text, pooled text, guidance.

use tch::{Kind, Tensor};

use super::AdapterSettings;
use super::inputs::{TimestepDtype, batched, guidance, packed, text_embeddings, unpacked};
use crate::error::Result;
use crate::flow::{FlowMatchingContext, FlowMatchingSettings, Guidance, ModelAdapter, NoiseLevels, Shift};
use crate::nn::Activations;
use crate::settings::{Keys, Settings};

/// Width of the zeros that stand for pooled text where the batch has none: CLIP-L's.
const POOLED_WIDTH: i64 = 768;

/// Source: NeMo AutoModel 0.5.0, `FluxAdapter`.
#[derive(Clone, Debug, PartialEq)]
pub struct Flux {
    pub guidance_scale: f64,
    pub use_guidance_embeds: bool,
    pub use_text_mask: bool,
    pub timestep_dtype: TimestepDtype,
}

impl Default for Flux {
    fn default() -> Self {
        Flux { guidance_scale: 3.5, use_guidance_embeds: true, use_text_mask: false, timestep_dtype: TimestepDtype::default() }
    }
}

impl Settings for Flux {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.number("guidance_scale", &mut self.guidance_scale, 0.0..=1000.0, "Guidance scale that the model is told in training.");
        let doc = "Whether the guidance scale is passed; only models that embed it take it, and those need it.";
        keys.flag("use_guidance_embeds", &mut self.use_guidance_embeds, doc);
        keys.flag("use_text_mask", &mut self.use_text_mask, "Whether attention leaves out the padding that the batch's `text_mask` marks.");
        self.timestep_dtype.visit(keys);
    }
}

impl AdapterSettings for Flux {
    fn build(&self) -> Box<dyn ModelAdapter> {
        Box::new(self.clone())
    }
}

impl ModelAdapter for Flux {
    fn condition_keys(&self) -> &'static [&'static str] {
        &["text_embeddings", "pooled_prompt_embeds", "clip_pooled"]
    }

    fn provides(&self) -> &'static [&'static str] {
        const ALL: &[&str] = &["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "grid", "guidance"];
        if self.use_guidance_embeds { ALL } else { &ALL[..ALL.len() - 1] }
    }

    /// `hidden_states` `[B, H/2 · W/2, 4·C]`, `encoder_hidden_states` `[B, L, D]`, `pooled_projections` `[B, P]`, `timestep`
    /// `[B]` in `[0, 1]`, `guidance` `[B]` f32, `grid`, `text_mask` `[B, L]` if it is used.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        let (tokens, grid) = packed(context, "flux")?;
        let (text, pooled) = self.conditions(context)?;
        let inputs = Activations::new()
            .with_constant("hidden_states", tokens)
            .with_constant("encoder_hidden_states", text)
            .with_constant("pooled_projections", pooled)
            .with_constant("timestep", self.timestep_dtype.of_one(context))
            .with_constant("guidance", guidance(context, self.guidance_scale))
            .with_constant("grid", grid);
        if self.use_text_mask { Ok(inputs.with_constant("text_mask", context.required("text_mask", "flux")?)) } else { Ok(inputs) }
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        unpacked(output)
    }

    /// Shifted further for more tokens where guidance is embedded (dev), not at all where it is not (schnell).
    fn noise_levels(&self, latents: &[i64], _settings: &FlowMatchingSettings) -> NoiseLevels {
        let tokens = latents[1..].iter().product::<i64>() / 4;
        let shift = Shift::between(tokens, (256, 0.5), (4096, 1.15));
        NoiseLevels::even(if self.use_guidance_embeds { shift } else { Shift::Constant(1.0) })
    }

    fn guidance(&self) -> Guidance {
        if self.use_guidance_embeds { Guidance::Embedded } else { Guidance::ClassifierFree }
    }
}

impl Flux {
    /// Text and pooled text, dropped together.
    fn conditions(&self, context: &FlowMatchingContext<'_>) -> Result<(Tensor, Tensor)> {
        let text = text_embeddings(context, "flux")?;
        let samples = text.size()[0];
        let pooled_key = ["pooled_prompt_embeds", "clip_pooled"].into_iter().find(|key| context.batch.get(key).is_some());
        let pooled = match pooled_key {
            Some(key) => batched(context, key, "flux", 2)?,
            None => Tensor::zeros([samples, POOLED_WIDTH], (context.dtype, context.device)),
        };
        if context.cfg_dropout_prob <= 0.0 {
            return Ok((text, pooled));
        }
        let drop = context.draws.uniform(&[samples]).lt(context.cfg_dropout_prob).to_kind(Kind::Bool);
        let text = context.dropped("text_embeddings", &text, &drop)?;
        let pooled = pooled_key.map_or_else(|| Ok(pooled.shallow_clone()), |key| context.dropped(key, &pooled, &drop))?;
        Ok((text, pooled))
    }
}
