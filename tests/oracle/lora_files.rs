//! LoRAs of PEFT and diffusers are read as they are, and what is written of them PEFT and
//! diffusers load without a missing or unexpected key, and predict alike.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fm_dist::files::outputs::Named;
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::lora::{self, Dialect, Facts, Family, Found, Linears, Lora, Pair};
use fm_dist::model;
use fm_dist::rng::{Key, Purpose};
use fm_dist::settings::Choice;
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{assert_close, fresh_seed, oracle};

/// Rounding of products of a few numbers in f32.
const ROUNDING: f64 = 1e-6;

fn read(path: &Path, family: Family) -> Lora {
    let Found { lora, .. } = lora::read(Named { argument: "--lora", path }, Some(family)).unwrap();
    lora
}

fn write(lora: &Lora, family: Family, dialect: Dialect, path: &Path) {
    lora::write(lora, family, dialect, Named { argument: "--out", path }).unwrap();
}

/// The modules of a model's transformer folder.
fn linears(folder: &Path) -> Linears {
    let stages = model::read_folder(folder).unwrap().stages().unwrap();
    let infos = stages.iter().flat_map(|stage| stage.params().infos());
    lora::linears(infos.map(|info| (info.name.as_str(), info.shape.as_slice())))
}

fn assert_updates(lora: &Lora, expected: &SafeTensors, what: &str) {
    assert_eq!(lora.pairs.len(), expected.tensors().len(), "{what}");
    for (name, pair) in &lora.pairs {
        let expected = expected.read(name).unwrap();
        assert_close(&pair.product(), &expected, ROUNDING, &format!("{what}: {name}"));
    }
}

fn part(lora: &Lora, is_of: impl Fn(&str) -> bool) -> Lora {
    let of = lora.pairs.iter().filter(|(name, _)| is_of(name));
    let pairs = of.map(|(name, pair)| (name.clone(), pair.shallow_clone())).collect();
    Lora { pairs, facts: lora.facts.clone() }
}

fn all(_: &str) -> bool {
    true
}

fn in_blocks(name: &str) -> bool {
    name.contains("blocks.")
}

fn in_double_blocks(name: &str) -> bool {
    name.starts_with("transformer_blocks.")
}

fn shared(name: &str) -> bool {
    !name.contains("embed.") && !name.contains("modulation")
}

/// A file that diffusers or PEFT load, and the modules that their loader knows in it.
type Loaded = (Dialect, fn(&str) -> bool);

fn loaded(family: Family) -> Vec<Loaded> {
    let further: [Loaded; 2] = match family {
        // diffusers takes kohya's single blocks for those of the real model, see `wide`.
        Family::Flux => [(Dialect::Comfyui, all), (Dialect::Kohya, in_double_blocks)],
        Family::Flux2 => [(Dialect::Comfyui, shared), (Dialect::Kohya, in_blocks)],
        Family::QwenImage => [(Dialect::Comfyui, all), (Dialect::Kohya, all)],
        Family::Wan => [(Dialect::Comfyui, all), (Dialect::Kohya, in_blocks)],
        Family::HunyuanVideo15 => return vec![(Dialect::Diffusers, all), (Dialect::Peft, all)],
    };
    let always: [Loaded; 2] = [(Dialect::Diffusers, all), (Dialect::Peft, all)];
    always.into_iter().chain(further).collect()
}

fn convert(folder: &Path, family: Family) {
    let folder = folder.join(family.word());
    let (theirs, ours) = (folder.join("theirs"), folder.join("ours"));
    fs::create_dir(&ours).unwrap();
    let updates = SafeTensors::open(folder.join("updates.safetensors")).unwrap();
    let lora = read(&theirs.join("diffusers"), family);
    for dialect in ["diffusers", "peft"] {
        let lora = read(&theirs.join(dialect), family);
        assert_updates(&lora, &updates, &format!("{}, {dialect}", family.word()));
        lora.fit(&linears(&folder.join("model"))).unwrap();
    }
    let mut modules = BTreeMap::new();
    for (dialect, is_of) in loaded(family) {
        let ending = if dialect == Dialect::Peft { "" } else { ".safetensors" };
        let (name, lora) = (format!("{}{ending}", dialect.word()), part(&lora, is_of));
        write(&lora, family, dialect, &ours.join(&name));
        modules.insert(name, lora.pairs.into_keys().collect::<Vec<_>>());
    }
    fs::write(ours.join("modules.json"), json!(modules).to_string()).unwrap();
    for dialect in [Dialect::Comfyui, Dialect::Kohya] {
        let path = ours.join(format!("all-{}.safetensors", dialect.word()));
        write(&lora, family, dialect, &path);
        assert_updates(&read(&path, family), &updates, &path.display().to_string());
    }
    let dora = read(&theirs.join("dora"), family);
    assert!(dora.pairs.values().all(|pair| pair.magnitude.is_some()));
    write(&dora, family, Dialect::Peft, &ours.join("dora-peft"));
    write(&dora, family, Dialect::Diffusers, &ours.join("dora-diffusers.safetensors"));
}

/// FLUX.1's first blocks at their real width, which diffusers' converter of kohya's files asks for.
fn wide(folder: &Path, key: Key) {
    let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/flux1-dev");
    // A scale of one leaves the matrices as they are, so that files can be equal.
    let alpha = |name: &str| if in_double_blocks(name) { 2.0 } else { 3.0 };
    let pair = |name: &str, [outputs, inputs]: [i64; 2]| {
        let (a, b) = key.named(name).seeded(|| (random([2, inputs]), random([outputs, 2])));
        Pair { a, b, alpha: alpha(name), magnitude: None }
    };
    let first = |name: &str| !name.contains("blocks.") || name.contains("blocks.0.");
    let of = linears(&root).into_iter().filter(|(name, _)| first(name));
    let pairs = of.map(|(name, shape)| (name.clone(), pair(&name, shape))).collect();
    let lora = Lora { pairs, facts: Facts::default() };
    fs::create_dir(folder).unwrap();
    for dialect in [Dialect::Diffusers, Dialect::Kohya] {
        let path = folder.join(format!("{}.safetensors", dialect.word()));
        write(&lora, Family::Flux, dialect, &path);
    }
}

#[test]
fn adapters_go_to_peft_and_diffusers_and_come_from_there() {
    let root = TempDir::new().unwrap();
    let (folder, seed) = (root.path(), fresh_seed("LoRAs"));
    oracle("lora_files.py", &["make", folder.to_str().unwrap(), &seed]);
    for (_, family) in Family::ALL {
        convert(folder, *family);
    }
    wide(&folder.join("wide"), Key::new(seed.parse().unwrap(), Purpose::Test));
    oracle("lora_files.py", &["judge", folder.to_str().unwrap(), &seed]);
}
