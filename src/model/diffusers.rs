//! A diffusers transformer folder's `config.json`: which family, with which settings.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::Model;
use crate::data::safetensors::refuse_pickled_weights;
use crate::error::{Error, Result, one_line};
use crate::settings::{self, Family};

const FILE_NAME: &str = "config.json";
/// The release whose classes and fields these are.
const VERSION: &str = "0.42.1";

/// The model that the folder's `config.json` describes.
///
/// # Errors
/// [`Error::Config`] naming every field that is unknown or has a value that is not supported; [`Error::Storage`] if the file
/// cannot be read; [`Error::CheckpointMismatch`] if its weights are a pickle.
pub fn read_folder(folder: &Path) -> Result<Model> {
    refuse_pickled_weights(folder)?;
    let path = folder.join(FILE_NAME);
    let shown = path.display().to_string();
    let text = fs::read_to_string(&path).map_err(|error| Error::config("model.path", format!("{shown} cannot be read: {error}")))?;
    let parsed: Result<Map<String, Value>, _> = serde_json::from_str(&text);
    let mut fields = parsed.map_err(|error| Error::config("model.path", format!("{shown}: {}", one_line(&error.to_string()))))?;
    let class = fields.get("_class_name").and_then(Value::as_str).unwrap_or_default().to_string();
    let mut model = of_class(&class).ok_or_else(|| Error::config("model.path", format!("{shown}: {}", unknown_class(&class))))?;
    // Notes of the library that wrote the file begin with an underscore.
    fields.retain(|name, _| !name.starts_with('_') && !model.retired_fields().contains(&name.as_str()));
    if fields.get("out_channels").is_some_and(Value::is_null) {
        // Where it says "as many as in_channels"; a default may be another number.
        fields.insert("out_channels".into(), Value::from(0));
    }
    settings::read_json(model.settings(), &shown, &fields)?;
    model.checked_stages().map(drop)?;
    Ok(model)
}

/// The family as the text of a `config.json`; none for a model that diffusers does not have.
pub fn write_config(model: &Model) -> Option<String> {
    let class = model.class_name()?;
    let mut fields = Map::from_iter([("_class_name".into(), class.into()), ("_diffusers_version".into(), VERSION.into())]);
    fields.extend(settings::write_json(model.clone().settings()));
    if fields.get("out_channels") == Some(&Value::from(0)) {
        fields.insert("out_channels".into(), Value::Null);
    }
    Some(serde_json::to_string_pretty(&fields).expect("a configuration is JSON") + "\n")
}

fn of_class(class: &str) -> Option<Model> {
    Model::NAMES.iter().filter_map(|name| Model::named(name)).find(|model| model.class_name() == Some(class))
}

fn unknown_class(class: &str) -> String {
    let known: Vec<&str> = Model::NAMES.iter().filter_map(|name| Model::named(name)).filter_map(|model| model.class_name()).collect();
    format!("_class_name is {class:?}; supported are {}", known.join(", "))
}
