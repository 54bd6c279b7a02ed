//! Files of LoRAs in the dialects that people load.
//!
//! | dialect | keys | alpha | loaded by |
//! |---|---|---|---|
//! | `diffusers` | `transformer.<diffusers' name>.lora_A.weight` | folded into B | `load_lora_weights`, `load_lora_adapter` |
//! | `comfyui` | those that ComfyUI knows, and diffusers too where there are such | as a tensor where both read it right, otherwise folded | ComfyUI; diffusers but for HunyuanVideo 1.5 |
//! | `kohya` | `lora_unet_<name>.lora_down.weight` | as a tensor | sd-scripts, musubi-tuner, ComfyUI, diffusers |
//! | `peft` | `base_model.model.<diffusers' name>.lora_A.weight` | in `adapter_config.json`; FLUX.2's folded, because diffusers loads it without that | PEFT, NeMo AutoModel |
//!
//! Reading sees the dialect and the family by the names. A file that is written is read back and
//! compared before it gets its name.
//!
//! | module | holds |
//! |---|---|
//! | `keys` | names of tensors: prefix, module, role |
//! | `rows` | several maps as one matrix, and back |
//! | `config` | peft's configuration, which diffusers' metadata and `adapter_config.json` hold |
//! | `facts` | the other metadata |
//! | `identify` | the family of a file |
//! | `read`, `write` | the files |

mod comfyui;
mod config;
mod diffusers;
mod facts;
mod identify;
mod keys;
mod kohya;
mod peft;
mod read;
mod rows;
mod write;

pub use read::{Found, read};
pub use write::write;

use super::family::{Family, Linear, Place};
use crate::settings::choice;

choice! {
    /// The form of a LoRA's file.
    pub enum Dialect {
        /// The file of diffusers' pipelines, `pytorch_lora_weights.safetensors`.
        "diffusers" => Diffusers,
        /// A file for ComfyUI, which diffusers loads as well where one file can serve both.
        "comfyui" => Comfyui,
        /// The file of sd-scripts and musubi-tuner.
        "kohya" => Kohya,
        /// The folder of PEFT and NeMo AutoModel: `adapter_model.safetensors` and
        /// `adapter_config.json`.
        "peft" => Peft,
    }
}

/// The form in which a dialect has a linear map.
#[derive(Clone, Copy, Debug)]
struct Form {
    prefix: &'static str,
    place: Place,
    /// True if the name's dots become underscores.
    is_flat: bool,
    alpha: Alpha,
    suffixes: Suffixes,
}

/// The place of alpha.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alpha {
    /// In B, which is scaled; alpha is the rank.
    Folded,
    /// In B, and the rank in a tensor.
    FoldedWithTensor,
    /// In a tensor of its own.
    Tensor,
    /// In peft's configuration.
    Config,
}

/// Endings of the keys of a pair.
#[derive(Clone, Copy, Debug)]
struct Suffixes {
    a: &'static str,
    b: &'static str,
    magnitude: &'static str,
    /// True if magnitudes are `[outputs, 1]` instead of `[outputs]`.
    has_column: bool,
}

const ALPHA: &str = ".alpha";
/// As diffusers and PEFT write.
const PEFT_SUFFIXES: Suffixes = Suffixes {
    a: ".lora_A.weight",
    b: ".lora_B.weight",
    magnitude: ".lora_magnitude_vector",
    has_column: false,
};

impl Alpha {
    fn is_folded(self) -> bool {
        matches!(self, Alpha::Folded | Alpha::FoldedWithTensor)
    }
}

impl Dialect {
    fn form(self, family: Family, linear: &Linear) -> Form {
        match self {
            Dialect::Diffusers => diffusers::form(linear),
            Dialect::Comfyui => comfyui::form(family, linear),
            Dialect::Kohya => kohya::form(family, linear),
            Dialect::Peft => peft::form(family, linear),
        }
    }
}
