//! The file of sd-scripts and musubi-tuner. Source: sd-scripts, `networks/lora_flux.py`;
//! musubi-tuner, `networks/lora.py`.
//!
//! diffusers loads Wan's only with all attentions and feed-forward parts of its blocks and nothing
//! else, and FLUX.2's without modulations and guidance; ComfyUI's form has no such limits.

use super::{Alpha, Form, Suffixes};
use crate::lora::family::{Family, Linear};

pub const PREFIX: &str = "lora_unet_";

pub const SUFFIXES: Suffixes = Suffixes {
    a: ".lora_down.weight",
    b: ".lora_up.weight",
    magnitude: ".dora_scale",
    has_column: true,
};

pub fn form(family: Family, linear: &Linear) -> Form {
    // diffusers drops the alpha of FLUX.1's last layer, and sd-scripts needs one.
    let is_dropped = family == Family::Flux && linear.kohya.name.starts_with("final_layer.");
    Form {
        prefix: PREFIX,
        place: linear.kohya,
        is_flat: true,
        alpha: if is_dropped { Alpha::FoldedWithTensor } else { Alpha::Tensor },
        suffixes: SUFFIXES,
    }
}
