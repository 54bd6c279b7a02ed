//! Reads and writes `config.json` of a diffusers transformer folder: the family and its settings.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::Kind;

use crate::error::{Error, Result};
use crate::files::contents::no_json;
use crate::files::safetensors::{Content, SafeTensors, TensorInfo, refuse_pickled_weights};
use crate::model::Model;
use crate::settings::{self, Family};

const FILE_NAME: &str = "config.json";
/// The file that marks a diffusers pipeline folder.
const PIPELINE_FILE_NAME: &str = "model_index.json";
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

/// Returns the reason why a path is not a transformer folder, with the path that was probably
/// meant.
fn no_transformer(path: &Path) -> Option<String> {
    let (shown, expected) = (path.display(), "expected a folder with config.json and safetensors");
    if path.is_file() {
        let inside = path.parent().filter(|folder| folder.join(FILE_NAME).is_file());
        let meant = inside
            .map(|folder| format!("; did you mean {}?", folder.display()))
            .unwrap_or_default();
        let meant = if meant.is_empty() { of_file(path) } else { meant };
        return Some(format!("{shown} is a file; {expected}{meant}"));
    }
    if !path.exists() {
        return Some(format!(
            "{shown} does not exist; {expected}{}",
            if is_hub_id(path) { download(path) } else { String::new() }
        ));
    }
    if path.join(FILE_NAME).is_file() {
        return None;
    }
    let meant = transformers_inside(path);
    let meant = if meant.is_empty() {
        String::new()
    } else {
        format!("; did you mean {}?", meant.join(" or "))
    };
    let found = if path.join(PIPELINE_FILE_NAME).is_file() {
        "is a whole pipeline"
    } else {
        "holds no config.json"
    };
    Some(format!("{shown} {found}; {expected}{meant}"))
}

/// Parts of the names that the published single files have, and diffusers' models do not.
const NATIVE: [&str; 3] = ["double_blocks.", "single_blocks.", ".self_attn."];
/// Parts of the names that diffusers' models have.
const DIFFUSERS: [&str; 3] = ["transformer_blocks.", ".attn1.", "condition_embedder."];

/// Returns what a file of weights is, and how a folder is made of it; nothing if it is unknown.
fn of_file(path: &Path) -> String {
    let Ok(file) = SafeTensors::open_as(path, Content::Weights) else { return String::new() };
    let has = |parts: &[&str]| {
        file.tensors().iter().any(|info| parts.iter().any(|part| info.name.contains(part)))
    };
    let is_narrow = |info: &TensorInfo| matches!(info.kind, Kind::Float8e4m3fn | Kind::Float8e5m2);
    let is_narrow = file.tensors().iter().any(is_narrow);
    let convert = format!(
        "diffusers' CLASS.from_single_file(\"{}\").save_pretrained(\"FOLDER\")",
        path.display()
    );
    match (has(&["lora_"]), has(&DIFFUSERS), has(&NATIVE)) {
        (true, ..) => {
            "; it is a LoRA: name it in lora.init_from, and its model's folder here".into()
        }
        (_, true, _) => "; its names are diffusers': move it into a folder as \
                         diffusion_pytorch_model.safetensors, beside the config.json of its model"
            .into(),
        (_, _, true) if is_narrow => format!(
            "; it is another program's single file in 8 bits: take the one in bfloat16, and convert \
             it once by {convert}; model.frozen_dtype holds it in 8 bits again"
        ),
        (_, _, true) => {
            format!("; it is another program's single file: convert it once by {convert}")
        }
        _ => String::new(),
    }
}

/// Returns the transformer folders in a pipeline's folder, or in the snapshots of a download cache.
fn transformers_inside(path: &Path) -> Vec<String> {
    let is_transformer = |folder: &Path| {
        folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("transformer"))
    };
    let mut found = Vec::new();
    for folder in folders_in(path)
        .into_iter()
        .chain(folders_in(&path.join("snapshots")).iter().flat_map(|folder| folders_in(folder)))
    {
        if is_transformer(&folder) && folder.join(FILE_NAME).is_file() {
            found.push(folder.display().to_string());
        }
    }
    found
}

fn folders_in(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

/// True for `owner/name`, the form of a model's name on a hub.
fn is_hub_id(path: &Path) -> bool {
    let legal = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.starts_with('.')
    };
    path.to_str()
        .and_then(|text| text.split_once('/'))
        .is_some_and(|(owner, name)| legal(owner) && legal(name))
}

fn download(id: &Path) -> String {
    let id = id.display();
    format!(
        "; nothing is downloaded: if it is a model's name on the hub, run `hf download {id} --include \"transformer/*\" --local-dir FOLDER` \
         and give FOLDER/transformer"
    )
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::{Device, Tensor};

    use super::*;
    use crate::files::safetensors;

    #[test]
    fn a_single_file_is_told_by_its_names_with_what_to_do() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("weights.safetensors");
        let said = |name: &str, kind: Kind| {
            let tensor = Tensor::ones([2, 2], (Kind::Float, Device::Cpu)).to_kind(kind);
            let mut file = fs::File::create(&path).expect("a file");
            safetensors::write(&mut file, &[(name, &tensor)], &BTreeMap::new()).expect("room");
            no_transformer(&path).expect("no folder")
        };
        let (wide, narrow) = (Kind::BFloat16, Kind::Float8e4m3fn);
        for (name, kind, expected) in [
            ("double_blocks.0.img_attn.qkv.weight", wide, "single file: convert it once"),
            ("model.diffusion_model.blocks.0.self_attn.q.weight", wide, "single file: convert it"),
            ("double_blocks.0.img_attn.qkv.weight", narrow, "single file in 8 bits: take the one"),
            ("transformer_blocks.0.attn.to_q.weight", wide, "its names are diffusers': move it"),
            (
                "model.diffusion_model.transformer_blocks.0.attn.to_q.weight",
                wide,
                "beside the conf",
            ),
            ("transformer_blocks.0.attn.to_q.lora_A.weight", wide, "it is a LoRA: name it in"),
        ] {
            let said = said(name, kind);
            assert!(said.contains("is a file; expected") && said.contains(expected), "{said}");
        }
        assert!(
            said("x", wide).ends_with("with config.json and safetensors"),
            "nothing is guessed"
        );
    }

    #[test]
    fn a_path_that_is_no_transformers_folder_is_told_with_the_one_that_was_meant() {
        let root = tempfile::tempdir().expect("a folder");
        let path = |name: &str| root.path().join(name);
        let said = |path: &Path| no_transformer(path).expect("no transformer");
        let transformer = path("pipeline/transformer");
        fs::create_dir_all(&transformer).expect("a folder");
        fs::write(path("pipeline/model_index.json"), "{}").expect("a file");
        fs::write(transformer.join("config.json"), "{}").expect("a file");
        fs::write(transformer.join("weights.safetensors"), "").expect("a file");
        assert_eq!(no_transformer(&transformer), None);
        let meant = format!("did you mean {}?", transformer.display());
        let text = said(&path("pipeline"));
        assert!(
            text.contains("is a whole pipeline; expected a folder with config.json")
                && text.ends_with(&meant),
            "{text}"
        );
        for file in ["weights.safetensors", "config.json"] {
            let text = said(&transformer.join(file));
            assert!(
                text.contains(&format!("{file} is a file;")) && text.ends_with(&meant),
                "{text}"
            );
        }
        let snapshot = path("cache/snapshots/0a/transformer");
        fs::create_dir_all(&snapshot).expect("a folder");
        fs::write(snapshot.join("config.json"), "{}").expect("a file");
        assert!(said(&path("cache")).ends_with(&format!("did you mean {}?", snapshot.display())));
        let text = said(Path::new("black-forest-labs/FLUX.1-dev"));
        assert!(
            text.contains("does not exist")
                && text.contains("`hf download black-forest-labs/FLUX.1-dev --include"),
            "{text}"
        );
        assert!(!said(Path::new("/nowhere/at-all")).contains("hf download"));
    }
}
