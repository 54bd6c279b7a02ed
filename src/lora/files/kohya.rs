//! The file of sd-scripts and musubi-tuner. Source: sd-scripts, `networks/lora_flux.py`;
//! musubi-tuner, `networks/lora.py`.

use super::{Alpha, Form, Suffixes};
use crate::lora::family::Linear;

pub const PREFIX: &str = "lora_unet_";

pub const SUFFIXES: Suffixes = Suffixes {
    a: ".lora_down.weight",
    b: ".lora_up.weight",
    magnitude: ".dora_scale",
    has_column: true,
};

pub fn form(linear: &Linear) -> Form {
    Form {
        prefix: PREFIX,
        place: linear.kohya,
        is_flat: true,
        alpha: Alpha::Tensor,
        suffixes: SUFFIXES,
    }
}
