//! ComfyUI's file: where diffusers has a loader, in the form that both read with the right scale.
//!
//! ComfyUI reads `diffusion_model.<name in the single file>`, for FLUX.1, FLUX.2 and Qwen-Image
//! also `transformer.<diffusers' name>`; alpha as a tensor, and no metadata. Source: ComfyUI,
//! `comfy/lora.py`, `comfy/utils.py` (`flux_to_diffusers`) and `comfy/weight_adapter/lora.py`;
//! diffusers 0.42.1, `loaders/lora_pipeline.py` and `loaders/lora_conversion_utils.py`.
//!
//! FLUX.2's modulations and embeddings have names of ComfyUI's alone: a file with them is for
//! ComfyUI, and diffusers takes its own form.

use super::{Alpha, Form, PEFT_SUFFIXES, Suffixes, diffusers, kohya};
use crate::lora::family::{Family, Linear, Part, Place};

const NATIVE: &str = "diffusion_model.";

const SUFFIXES: Suffixes = Suffixes {
    magnitude: kohya::SUFFIXES.magnitude,
    has_column: kohya::SUFFIXES.has_column,
    ..PEFT_SUFFIXES
};

pub fn form(family: Family, linear: &Linear) -> Form {
    let by_diffusers = Place { name: linear.diffusers, part: Part::Whole };
    let (prefix, place, alpha) = match family {
        // diffusers' loader takes the alpha of `proj_out` for that of all names that end so.
        Family::Flux => (diffusers::PREFIX, by_diffusers, Alpha::Folded),
        // diffusers' loader refuses alpha.
        Family::Flux2 if is_mapped(linear) => (diffusers::PREFIX, by_diffusers, Alpha::Folded),
        Family::Flux2 => (NATIVE, linear.native, Alpha::Folded),
        Family::QwenImage => (NATIVE, linear.native, Alpha::Tensor),
        // diffusers' loader takes alpha in blocks only.
        Family::Wan if linear.diffusers.starts_with("blocks.") => {
            (NATIVE, linear.native, Alpha::Tensor)
        }
        Family::Wan => (NATIVE, linear.native, Alpha::Folded),
        Family::HunyuanVideo15 => (NATIVE, linear.native, Alpha::Tensor),
    };
    Form { prefix, place, is_flat: false, alpha, suffixes: SUFFIXES }
}

/// True if ComfyUI's table, made for FLUX.1, knows diffusers' name of a map of FLUX.2.
fn is_mapped(linear: &Linear) -> bool {
    !["time_guidance_embed.", "double_stream_modulation_", "single_stream_modulation."]
        .iter()
        .any(|start| linear.diffusers.starts_with(start))
}
