//! Reads and writes `config.json` of a diffusers transformer folder: the family and its settings.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::mistaken::no_transformer;
use crate::error::{Error, Result};
use crate::files::contents::no_json;
use crate::files::safetensors::refuse_pickled_weights;
use crate::model::Model;
use crate::settings::{self, Family};

pub(super) const FILE_NAME: &str = "config.json";
/// The diffusers release whose classes and fields are supported.
const VERSION: &str = "0.42.1";

/// Reads the model that the folder's `config.json` describes.
///
/// # Errors
/// [`Error::Config`] naming every field that is unknown or has an unsupported value;
/// [`Error::Storage`] if the file cannot be read; [`Error::CheckpointMismatch`] if its weights are
/// a pickle.
pub fn read_folder(folder: &Path) -> Result<Model> {
    refuse_pickled_weights(folder)?;
    let path = folder.join(FILE_NAME);
    if let Some(what) = no_transformer(folder) {
        return Err(Error::config("model.path", what));
    }
    let shown = path.display().to_string();
    let text = fs::read(&path)
        .map_err(|error| Error::config("model.path", format!("{shown} cannot be read: {error}")))?;
    let parsed: Result<Map<String, Value>, _> = serde_json::from_slice(&text);
    let mut fields = parsed.map_err(|error| {
        Error::config("model.path", format!("{shown}: {}", no_json(&text, &error)))
    })?;
    let class = fields.get("_class_name").and_then(Value::as_str).unwrap_or_default().to_string();
    let mut model = model_of_class(&class).ok_or_else(|| {
        Error::config("model.path", format!("{shown}: {}", unknown_class(&class)))
    })?;
    // Fields that begin with an underscore are notes of the library that wrote the file.
    fields.retain(|name, _| {
        !name.starts_with('_') && !model.retired_fields().contains(&name.as_str())
    });
    if fields.get("out_channels").is_some_and(Value::is_null) {
        // Null means "as many as in_channels"; the default may be another number.
        fields.insert("out_channels".into(), Value::from(0));
    }
    settings::read_json(model.settings(), &shown, &fields)?;
    model.checked_stages().map(drop)?;
    Ok(model)
}

/// Returns the family as the text of a `config.json`; `None` for a model that diffusers does not
/// have.
pub fn write_config(model: &Model) -> Option<String> {
    let class = model.class_name()?;
    let mut fields = Map::from_iter([
        ("_class_name".into(), class.into()),
        ("_diffusers_version".into(), VERSION.into()),
    ]);
    fields.extend(settings::write_json(model.clone().settings()));
    if fields.get("out_channels") == Some(&Value::from(0)) {
        fields.insert("out_channels".into(), Value::Null);
    }
    Some(serde_json::to_string_pretty(&fields).expect("a configuration is JSON") + "\n")
}

fn model_of_class(class: &str) -> Option<Model> {
    Model::NAMES
        .iter()
        .filter_map(|name| Model::named(name))
        .find(|model| model.class_name() == Some(class))
}

fn unknown_class(class: &str) -> String {
    if class.is_empty() {
        return "has no _class_name, so it describes no model of diffusers".into();
    }
    let known: Vec<&str> = Model::NAMES
        .iter()
        .filter_map(|name| Model::named(name))
        .filter_map(|model| model.class_name())
        .collect();
    format!("_class_name is {class:?}; supported are {}", known.join(", "))
}
