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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(fields: Value) -> Config {
        let Value::Object(fields) = fields else { panic!("an object") };
        Config::new(Path::new("text_encoder/config.json"), fields)
    }

    fn read(fields: Value) -> TextClass {
        TextClass::of(config(fields)).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The message about a `config.json` that lies, behind its path.
    fn said(fields: Value) -> String {
        let text = TextClass::of(config(fields)).expect_err("it lies").to_string();
        assert!(!text.contains('\n'), "{text}");
        text.strip_prefix("text_encoder/config.json: ").expect("the path").to_string()
    }

    #[test]
    fn an_encoder_that_nobody_has_is_told_with_those_there_are() {
        let text = said(json!({"architectures": ["BertModel"], "model_type": "bert"}));
        let expected =
            "architectures has \"BertModel\"; supported are T5EncoderModel, UMT5EncoderModel, ";
        assert!(text.starts_with(expected), "{text}");
        assert!(
            said(json!({"model_type": "bert"})).starts_with("model_type is \"bert\"; supported")
        );
        let none =
            "has neither architectures nor a model_type, so it describes no class of transformers";
        assert_eq!(said(json!({"architectures": []})), none);
        let siglip = Siglip::of(config(json!({"model_type": "clip_vision_model"})));
        let text = siglip.expect_err("another class").to_string();
        assert!(text.ends_with("\"clip_vision_model\"; supported are SiglipVisionModel"), "{text}");
    }

    #[test]
    fn a_class_with_the_same_encoder_in_it_is_known_by_its_type() {
        let whole = read(json!({
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
            "feed_forward_proj": "gated-gelu",
        }));
        assert_eq!(whole.name(), "T5EncoderModel");
        let text =
            json!({"architectures": ["Qwen2_5_VLTextModel"], "model_type": "qwen2_5_vl_text"});
        assert_eq!(read(text).name(), "Qwen2_5_VLForConditionalGeneration");
    }

    #[test]
    fn a_field_that_is_missing_has_its_default_and_one_that_nobody_knows_is_left_alone() {
        let qwen3 = json!({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"],
            "sliding_window": null, "head_dim": null, "output_past": true});
        assert_eq!(read(qwen3), TextClass::Qwen3(Default::default()));
    }

    #[test]
    fn rotations_are_read_as_versions_4_and_5_write_them() {
        let theta = |fields: Value| {
            let mut all = json!({"architectures": ["Qwen3ForCausalLM"]});
            all.as_object_mut()
                .expect("an object")
                .extend(fields.as_object().expect("too").clone());
            let TextClass::Qwen3(qwen3) = read(all) else { panic!("another class") };
            qwen3.rope_theta
        };
        assert_eq!(theta(json!({"rope_theta": 1_000_000, "rope_scaling": null})), 1e6);
        let nested = json!({"rope_theta": 5e5, "rope_type": "default"});
        assert_eq!(theta(json!({"rope_parameters": nested, "rope_theta": 7})), 5e5);
        assert_eq!(theta(json!({})), 1e4);
        let scaled = json!({"architectures": ["Qwen3ForCausalLM"],
            "rope_scaling": {"type": "yarn", "factor": 4.0}});
        assert!(said(scaled).contains("rope_type: "));
    }

    #[test]
    fn settings_of_an_encoder_that_contradict_each_other_are_told_by_a_field() {
        let mistral = |text: Value| json!({"model_type": "mistral3", "text_config": text});
        for (fields, expected) in [
            (
                json!({"model_type": "t5"}),
                "feed_forward_proj: only \"gated-gelu\" is supported, T5 1.1's",
            ),
            (
                json!({"model_type": "umt5", "relative_attention_max_distance": 8}),
                "relative_attention_max_distance: 8 must be above a quarter of \
                 relative_attention_num_buckets, 8",
            ),
            (
                json!({"model_type": "clip_text_model", "num_attention_heads": 7}),
                "hidden_size: 512 is no multiple of num_attention_heads, 7",
            ),
            (
                json!({"model_type": "qwen3", "num_key_value_heads": 5}),
                "num_attention_heads: 32 is no multiple of num_key_value_heads, 5",
            ),
            (
                json!({"model_type": "qwen3", "head_dim": 63}),
                "head_dim: 63 is odd, and features are rotated in pairs",
            ),
            (
                json!({"model_type": "qwen2_5_vl", "use_sliding_window": true}),
                "use_sliding_window: only false is supported",
            ),
            (json!({"model_type": "mistral3"}), "has no text_config"),
            (mistral(json!({"head_dim": 0})), "head_dim: 0 is out of range"),
            (mistral(json!({"sliding_window": -1})), "sliding_window: -1 is out of range"),
            (
                json!({"model_type": "t5", "quantization_config": {"bits": 4}}),
                "has a quantization_config, and packed weights are not read here; take the folder \
                 with the unpacked ones",
            ),
        ] {
            assert_eq!(said(fields), expected);
        }
        assert!(said(mistral(json!({"model_type": "ministral3"}))).contains("model_type: "));
    }

    #[test]
    fn fields_of_an_encoder_that_are_wrong_are_told_all_at_once() {
        let text = said(json!({"model_type": "clip_text_model", "hidden_size": "768",
            "hidden_act": "relu", "num_hidden_layers": 1 << 20}));
        for part in [
            "hidden_size: expected an integer, found the text \"768\"",
            "hidden_act: ",
            "num_hidden_layers: 1048576 is out of range",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
