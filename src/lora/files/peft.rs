//! PEFT's folder, which NeMo AutoModel writes, too. Source: PEFT, `utils/save_and_load.py`.

use super::{Alpha, Form, PEFT_SUFFIXES};
use crate::lora::family::{Family, Linear, Part, Place};

pub const PREFIX: &str = "base_model.model.";
pub const FILE: &str = "adapter_model.safetensors";
pub const CONFIG: &str = "adapter_config.json";

pub fn form(family: Family, linear: &Linear) -> Form {
    let place = Place { name: linear.diffusers, part: Part::Whole };
    // diffusers loads FLUX.2's file without its configuration.
    let alpha = if family == Family::Flux2 { Alpha::Folded } else { Alpha::Config };
    Form { prefix: PREFIX, place, is_flat: false, alpha, suffixes: PEFT_SUFFIXES }
}
