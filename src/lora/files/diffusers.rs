//! diffusers' own file. Source: diffusers 0.42.1, `loaders/lora_base.py` and `loaders/peft.py`.
//!
//! Alpha is folded into B, and the metadata say so: some loaders of diffusers refuse a tensor of
//! alpha, others do not look at the metadata.

use super::{Alpha, Form, PEFT_SUFFIXES};
use crate::lora::family::{Linear, Part, Place};

/// Beginning of the names, also in the metadata.
pub const PREFIX: &str = "transformer.";
/// Entry of the metadata with peft's configuration.
pub const METADATA: &str = "lora_adapter_metadata";
/// Name of the file in a folder.
pub const FILE: &str = "pytorch_lora_weights.safetensors";

pub fn form(linear: &Linear) -> Form {
    let place = Place { name: linear.diffusers, part: Part::Whole };
    Form { prefix: PREFIX, place, is_flat: false, alpha: Alpha::Folded, suffixes: PEFT_SUFFIXES }
}
