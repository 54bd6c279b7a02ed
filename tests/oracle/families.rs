//! The model families are diffusers': predictions, losses and every gradient of tiny random models,
//! new ones each run.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use fm_dist::commands::{StepRequest, dump_step};
use fm_dist::config::RunConfig;
use fm_dist::files::safetensors::{self, SafeTensors};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{
    BFLOAT16, GRADIENT, LOSS, assert_as_good, assert_close, assert_within_one_ulp, entries,
    fresh_seed, oracle, relative_difference,
};
use crate::threads::training::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, Tiny, WAN};

/// What rounding leaves of a gradient that is zero, as a share of the whole gradient; bfloat16's
/// last bit is 4e-3 of a number.
const VANISHING: f64 = 1e-3;
/// HunyuanVideo in bfloat16, prediction and gradients: its text refiner rounds in another order
/// than diffusers, where the other families' predictions are equal bit for bit. Twice the worst
/// prediction of some 130 cases, 2.0e-2; what is farther is held to float32.
const BFLOAT16_REFINED: (f64, f64) = (4e-2, 8e-2);
/// DoRA in bfloat16: PEFT rounds the changed weight, its norms and the factors of the rows to
/// bfloat16, we only the factors.
const BFLOAT16_DORA: (f64, f64) = (4e-2, 1.2e-1);
/// Exponentials and logarithms of a GPU beside those of a CPU: sigma is computed where it is drawn,
/// by either side. Eight units in the last place.
const OTHER_DEVICE: f64 = 1e-6;
/// What rounds to one unit of bfloat16 in the norm of the whole gradient. A parameter's gradient
/// below it is what larger ones leave when they cancel, and carries their rounding: its error is
/// compared with this share of the whole instead of itself.
const CANCELLED: f64 = 1.0 / 256.0;

/// The device of both sides, and what draws for both: words of `parallel.device` and
/// `flow_matching.draws`.
#[derive(Clone, Copy)]
pub struct Place {
    pub device: &'static str,
    pub draws: &'static str,
}

pub const CPU: Place = Place { device: "cpu", draws: "host" };

/// New cases of one family, computed by both sides on the same device.
pub fn check_family(family: &str, place: Place) {
    let folder = TempDir::new().unwrap();
    let (out, seed) = (folder.path().to_str().unwrap(), fresh_seed(family));
    let Place { device, draws } = place;
    let places = ["--device", device, "--draws", draws];
    oracle("families.py", &[&[out, &seed, "--families", family][..], &places].concat());
    let cases = entries(&folder.path().join("cases.json"));
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 6, "{family} has {} cases", cases.len());
    for case in cases {
        check_case(case, &folder.path().join(case["folder"].as_str().unwrap()), place);
    }
    println!("| {family} on {device}, draws of the {draws} | {} cases hold", cases.len());
}

/// The case's model and settings, as its user would configure them.
fn config_of(case: &Value, folder: &Path, place: Place) -> RunConfig {
    let text = |value: &Value| format!("{value}");
    let mut overrides =
        vec![format!("model.path={}", text(&folder.join("model").to_str().unwrap().into()))];
    overrides.push(format!("model.dtype={}", case["dtype"]));
    overrides.push(format!("parallel.device={:?}", place.device));
    if place.device != CPU.device {
        // By name, because a trial of all backends runs the program, which this process is not.
        overrides.push("compute.attention=\"efficient\"".into());
    }
    overrides.extend(
        case["settings"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(key, value)| format!("{key}={}", text(value))),
    );
    RunConfig::read("oracle", "", &overrides)
        .unwrap_or_else(|error| panic!("{}: {error}", case["name"]))
}

/// Compares what both sides computed of one case.
pub fn check_case(case: &Value, folder: &Path, place: Place) {
    let config = config_of(case, folder, place);
    let dump: PathBuf = folder.join("dump.safetensors");
    let request = StepRequest {
        batch: folder.join("batch.safetensors"),
        dump: dump.clone(),
        weights: None,
        torch_seed: case["seed"].as_i64(),
        grads: true,
        operators: false,
    };
    dump_step(&config, &request).unwrap_or_else(|error| panic!("{}: {error}", case["name"]));
    let (found, expected) = (
        SafeTensors::open(&dump).unwrap(),
        SafeTensors::open(folder.join("expected.safetensors")).unwrap(),
    );
    let exact = folder.join("exact.safetensors");
    let exact = exact.exists().then(|| SafeTensors::open(&exact).unwrap());
    let (value_tolerance, gradient_tolerance) = match case["dtype"].as_str().unwrap() {
        "float32" => (LOSS, GRADIENT),
        _ if case["settings"]["lora.use_dora"] == true => BFLOAT16_DORA,
        _ if case["name"].as_str().unwrap().starts_with("hunyuan") => BFLOAT16_REFINED,
        _ => BFLOAT16,
    };
    let whole = case["gradient_norm"].as_f64().unwrap_or_else(|| gradient_norm(&expected));
    let mut worst = [(0.0, String::new()), (0.0, String::new())];
    for info in expected.tensors() {
        let name = info.name.as_str();
        let what = format!("{} {name} {}", case["name"], case["settings"]);
        let (found, expected) = (found.read(name).unwrap(), expected.read(name).unwrap());
        match name {
            "sigma" | "timesteps" if place.device != CPU.device => {
                assert_close(&found, &expected, OTHER_DEVICE, &what)
            }
            "sigma" | "timesteps" | "noise" | "target" => {
                assert_within_one_ulp(&found, &expected, &what)
            }
            _ if vanishes(case, name) => {
                assert!(norm(&found) <= VANISHING * whole, "{what}: {} of {whole}", norm(&found))
            }
            _ => {
                let is_gradient = name.starts_with("grad.");
                let cancelled = if case["dtype"] == "float32" { 0.0 } else { CANCELLED * whole };
                let tolerance = match is_gradient {
                    true => gradient_tolerance * (cancelled / norm(&expected)).max(1.0),
                    false => value_tolerance,
                };
                let exact = exact.as_ref().and_then(|exact| exact.read(name).ok());
                assert_as_good([&found, &expected], exact.as_ref(), tolerance, &what);
                let closest = &mut worst[usize::from(is_gradient)];
                let share = relative_difference(&found, &expected) / tolerance;
                if share > closest.0 {
                    *closest = (share, name.to_string());
                }
            }
        }
    }
    println!("{} {}: nearest to their tolerances: {worst:.2?}", case["name"], case["dtype"]);
    let gradients = |file: &SafeTensors| {
        file.tensors().iter().filter(|info| info.name.starts_with("grad.")).count()
    };
    assert_eq!(gradients(&found), gradients(&expected), "{}", case["name"]);
}

/// Whether the mathematics make this gradient zero: a bias on all keys changes no softmax. Rounding
/// is all there is to compare.
fn vanishes(case: &Value, name: &str) -> bool {
    let names = case["vanishing_gradients"].as_array().unwrap();
    names.iter().any(|vanishing| name.strip_prefix("grad.") == vanishing.as_str())
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.to_kind(Kind::Double).norm().double_value(&[])
}

/// Of all gradients together.
fn gradient_norm(file: &SafeTensors) -> f64 {
    let gradients = file.tensors().iter().filter(|info| info.name.starts_with("grad."));
    gradients.map(|info| norm(&file.read(&info.name).unwrap()).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn flux_is_diffusers_flux() {
    check_family("flux", CPU);
}

#[test]
fn flux2_is_diffusers_flux2() {
    check_family("flux2", CPU);
}

#[test]
fn qwen_image_is_diffusers_qwen_image() {
    check_family("qwen_image", CPU);
}

#[test]
fn wan_is_diffusers_wan() {
    check_family("wan", CPU);
}

#[test]
fn hunyuan_video15_is_diffusers_hunyuan_video15() {
    check_family("hunyuan_video15", CPU);
}

/// What a family says of a batch of two samples of these shapes.
fn refusal(family: &Tiny, keys: &[(&str, &[i64])]) -> String {
    let root = TempDir::new().unwrap();
    let (batch, dump) =
        (root.path().join("batch.safetensors"), root.path().join("dump.safetensors"));
    let tensors: Vec<(&str, Tensor)> = keys
        .iter()
        .map(|(key, shape)| {
            (*key, Tensor::zeros([&[2], *shape].concat(), (Kind::Float, Device::Cpu)))
        })
        .collect();
    let borrowed: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(key, tensor)| (*key, tensor)).collect();
    let metadata = BTreeMap::from([("data_type".to_string(), family.data_type.to_string())]);
    safetensors::write(&mut File::create(&batch).unwrap(), &borrowed, &metadata).unwrap();
    let request = StepRequest {
        batch,
        dump,
        weights: None,
        torch_seed: Some(1),
        grads: false,
        operators: false,
    };
    dump_step(&family.config(root.path(), root.path(), &[]), &request).unwrap_err().to_string()
}

#[test]
fn a_batch_that_does_not_fit_is_refused_by_what_is_wrong() {
    for family in [FLUX, FLUX2, QWEN_IMAGE, WAN, HUNYUAN_VIDEO15] {
        let others: Vec<_> =
            family.keys[1..].iter().copied().filter(|(key, _)| *key != "text_embeddings").collect();
        let with = |keys: &[(&str, &[i64])]| refusal(&family, &[others.as_slice(), keys].concat());
        let latents = family.keys[0];
        let text = with(&[latents]);
        assert!(
            text.contains(&format!("the {} adapter needs `text_embeddings`", family.adapter)),
            "{text}"
        );
        let text = with(&[latents, ("text_embeddings", &[5, 11])]);
        assert!(text.contains("is 12, the data's text_embeddings have 11"), "{text}");
        let other_rank: &[i64] =
            if family.data_type == "image" { &[4, 3, 8, 12] } else { &[4, 8, 12] };
        let text = with(&[(latents.0, other_rank), ("text_embeddings", &[5, 12])]);
        assert!(text.contains("takes latents [C, "), "{text}");
    }
    for family in [FLUX, QWEN_IMAGE] {
        let text =
            refusal(&family, &[("image_latents", &[4, 7, 12]), ("text_embeddings", &[5, 12])]);
        assert!(text.contains("does not divide the data's latents of 7 x 12"), "{text}");
    }
}
