//! Paths that are taken for the folder of a diffusers transformer: what they are, and which path or
//! command was meant.

use std::fs;
use std::path::{Path, PathBuf};

use tch::Kind;

use super::diffusers::FILE_NAME;
use crate::files::safetensors::{Content, SafeTensors, TensorInfo};
use crate::folders;

/// The file that marks a diffusers pipeline folder.
const PIPELINE_FILE_NAME: &str = "model_index.json";

/// Parts of the names that the published single files have, and diffusers' models do not.
const NATIVE: [&str; 3] = ["double_blocks.", "single_blocks.", ".self_attn."];
/// Parts of the names that diffusers' models have.
const DIFFUSERS: [&str; 3] = ["transformer_blocks.", ".attn1.", "condition_embedder."];

/// Returns the reason why a path is not a transformer folder, with the path that was probably
/// meant; nothing if it is one.
pub(super) fn no_transformer(path: &Path) -> Option<String> {
    let (is, meant) = if path.is_file() {
        ("is a file", beside(path).unwrap_or_else(|| of_file(path)))
    } else if !path.exists() {
        ("does not exist", of_name(path, &folders::downloads().unwrap_or_default()))
    } else if path.join(FILE_NAME).is_file() {
        return None;
    } else if path.join(PIPELINE_FILE_NAME).is_file() {
        ("is a whole pipeline", did_you_mean(&transformers_inside(path)))
    } else {
        ("holds no config.json", did_you_mean(&transformers_inside(path)))
    };
    let shown = path.display();
    Some(format!("{shown} {is}; expected a folder with config.json and safetensors{meant}"))
}

fn did_you_mean(folders: &[PathBuf]) -> String {
    if folders.is_empty() {
        return String::new();
    }
    let shown: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    format!("; did you mean {}?", shown.join(" or "))
}

/// Returns the folder that a file lies in, if that is one of a transformer.
fn beside(file: &Path) -> Option<String> {
    let folder = file.parent().filter(|folder| folder.join(FILE_NAME).is_file())?;
    Some(did_you_mean(&[folder.to_path_buf()]))
}

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
fn transformers_inside(path: &Path) -> Vec<PathBuf> {
    let snapshots = folders_in(&path.join("snapshots"));
    let inside = snapshots.iter().flat_map(|folder| folders_in(folder));
    let is_transformer = |folder: &PathBuf| {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("transformer") && folder.join(FILE_NAME).is_file()
    };
    folders_in(path).into_iter().chain(inside).filter(is_transformer).collect()
}

fn folders_in(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

/// Returns what a path that does not exist may mean as a model's name on the hub: its snapshot in
/// `cache`, or how it is downloaded.
fn of_name(path: &Path, cache: &Path) -> String {
    let Some((owner, name)) = hub_name(path) else { return String::new() };
    let cached = transformers_inside(&cache.join(format!("models--{owner}--{name}")));
    if !cached.is_empty() {
        return did_you_mean(&cached);
    }
    format!(
        "; nothing is downloaded: if it is a model's name on the hub, run `hf download {owner}/{name} \
         --include \"transformer/*\" --local-dir FOLDER` and give FOLDER/transformer"
    )
}

/// Returns owner and name if a path has the form of a model's name on a hub.
fn hub_name(path: &Path) -> Option<(&str, &str)> {
    let is_legal = |part: &str| {
        let is_legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(is_legal)
    };
    let parts = path.to_str()?.split_once('/')?;
    [parts.0, parts.1].into_iter().all(is_legal).then_some(parts)
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
        assert!(said(Path::new("/nowhere/at-all")).ends_with("with config.json and safetensors"));
    }

    #[test]
    fn a_models_name_is_looked_for_among_the_downloads() {
        let cache = tempfile::tempdir().expect("a folder");
        let said = |name: &str| of_name(Path::new(name), cache.path());
        let name = "black-forest-labs/FLUX.1-dev";
        let text = said(name);
        assert!(text.contains(&format!("`hf download {name} --include")), "{text}");
        let snapshot = "models--black-forest-labs--FLUX.1-dev/snapshots/0a/transformer";
        let snapshot = cache.path().join(snapshot);
        fs::create_dir_all(&snapshot).expect("a folder");
        fs::write(snapshot.join("config.json"), "{}").expect("a file");
        assert_eq!(said(name), format!("; did you mean {}?", snapshot.display()));
        for path in ["nowhere", "no/where/at-all", "../models", "a b/c"] {
            assert_eq!(said(path), "", "{path}");
        }
    }
}
