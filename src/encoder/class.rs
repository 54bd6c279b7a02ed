//! The class that a `config.json` describes.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Depth, Siglip, TextClass};
use crate::error::{Error, Result};
use crate::published::{Config, Part};
use crate::settings::{self, Family, Settings};

/// Text encoders in a pipeline's folder.
pub(super) const TEXT: Part = Part { noun: "text encoder", folder: "text_encoder", stem: "model" };
/// The image encoder in a pipeline's folder.
pub(super) const IMAGE: Part =
    Part { noun: "image encoder", folder: "image_encoder", stem: "model" };

/// The class for each `model_type`, for folders whose `architectures` name another class with the
/// same encoder in it, or none.
const MODEL_TYPES: [(&str, &str); 7] = [
    ("t5", "T5EncoderModel"),
    ("umt5", "UMT5EncoderModel"),
    ("clip_text_model", "CLIPTextModel"),
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    ("qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration"),
    ("qwen3", "Qwen3ForCausalLM"),
    ("mistral3", "Mistral3ForConditionalGeneration"),
];
/// The class of image encoders, and its `model_type`.
const SIGLIP: (&str, &str) = ("SiglipVisionModel", "siglip_vision_model");
/// The field that holds the text part's fields in classes of several parts.
const TEXT_FIELDS: &str = "text_config";

impl TextClass {
    /// Reads a folder's `config.json`. A field that it lacks has the class's default, and one that
    /// the class does not know is left alone, as in transformers.
    ///
    /// # Errors
    /// [`Error::Data`] if the file is missing, no JSON, of an unknown class, or contradicts itself;
    /// [`Error::Config`] naming every field that has an unsupported value;
    /// [`Error::CheckpointMismatch`] if the weights are a pickle.
    pub fn read(folder: &Path) -> Result<Self> {
        TextClass::of(Config::read(folder, TEXT)?)
    }

    fn of(config: Config) -> Result<Self> {
        let mut class = class_of(&config).ok_or_else(|| unknown(&config, TextClass::NAMES))?;
        let config = match config.fields().get(TEXT_FIELDS) {
            Some(Value::Object(fields)) => config.clone().with_fields(fields.clone()),
            _ if matches!(class, TextClass::Mistral3(_)) => {
                return Err(config.refused(format!("has no {TEXT_FIELDS}")));
            }
            _ => config,
        };
        read_known(&config, class.settings())?;
        class.check().map_err(|what| config.refused(what))?;
        Ok(class)
    }

    /// Names and shapes of all weights, as the class has them.
    pub fn tensors(&self) -> BTreeMap<String, Vec<i64>> {
        let network = self.network(Depth { layers: self.sizes().layers, is_normed: true });
        let infos = network.params().infos().iter();
        infos.map(|info| (info.name.clone(), info.shape.clone())).collect()
    }
}

impl Siglip {
    /// Reads a folder's `config.json`, as [`TextClass::read`].
    ///
    /// # Errors
    /// As [`TextClass::read`].
    pub fn read(folder: &Path) -> Result<Self> {
        Siglip::of(Config::read(folder, IMAGE)?)
    }

    fn of(config: Config) -> Result<Self> {
        let (name, model_type) = SIGLIP;
        if architecture(&config) != name && config.text("model_type") != Some(model_type) {
            return Err(unknown(&config, &[name]));
        }
        let mut class = Siglip::default();
        read_known(&config, &mut class)?;
        class.check().map_err(|what| config.refused(what))?;
        Ok(class)
    }
}

/// The first of the classes that the file names; empty if there is none.
fn architecture(config: &Config) -> &str {
    let names = config.fields().get("architectures").and_then(Value::as_array);
    names.and_then(|names| names.first()).and_then(Value::as_str).unwrap_or_default()
}

fn class_of(config: &Config) -> Option<TextClass> {
    let by_type = || {
        let model_type = config.text("model_type")?;
        let (_, name) = MODEL_TYPES.iter().find(|(known, _)| *known == model_type)?;
        TextClass::named(name)
    };
    TextClass::named(architecture(config)).or_else(by_type)
}

fn unknown(config: &Config, supported: &[&str]) -> Error {
    let supported = supported.join(", ");
    let model_type = config.text("model_type").unwrap_or_default();
    match (architecture(config), model_type) {
        ("", "") => config.refused(
            "has neither architectures nor a model_type, so it describes no class of transformers",
        ),
        ("", model_type) => {
            config.refused(format!("model_type is {model_type:?}; supported are {supported}"))
        }
        (name, _) => {
            config.refused(format!("architectures has {name:?}; supported are {supported}"))
        }
    }
}

/// Reads the fields that `settings` have, and those that only look otherwise.
fn read_known(config: &Config, settings: &mut dyn Settings) -> Result<()> {
    if config.fields().get("quantization_config").is_some_and(Value::is_object) {
        let what = "has a quantization_config, and packed weights are not read here; take the folder with the unpacked ones";
        return Err(config.refused(what));
    }
    let known = settings::write_json(settings);
    let fields = with_rotation(config.fields());
    let fields = fields.into_iter().filter(|(name, _)| known.contains_key(name)).collect();
    config.clone().with_fields(fields).read_into(settings)
}

/// The fields with those of the rotation among them: `rope_theta` and `rope_type` stand in an
/// object `rope_parameters`, `rope_scaling` in older files.
fn with_rotation(fields: &Map<String, Value>) -> Map<String, Value> {
    let mut flat = fields.clone();
    let object = |name| fields.get(name).and_then(Value::as_object);
    let rotation = object("rope_scaling").or_else(|| object("rope_parameters"));
    let Some(rotation) = rotation else { return flat };
    if let Some(theta) = rotation.get("rope_theta") {
        flat.insert("rope_theta".into(), theta.clone());
    }
    if let Some(kind) = rotation.get("rope_type").or_else(|| rotation.get("type")) {
        flat.insert("rope_type".into(), kind.clone());
    }
    flat
}
