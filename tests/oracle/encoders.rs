//! The encoders are transformers': states, pooled vectors and pictures of tiny random ones, new
//! ones each run.

use std::path::Path;

use fm_dist::encoder::{ImageEncoder, Output, TextEncoder, pixels_of};
use fm_dist::files::safetensors::SafeTensors;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{
    BFLOAT16, LOSS, assert_as_good, entries, fresh_seed, oracle, relative_difference,
};

/// New cases of one class, each checked by `check`.
fn check_class(class: &str, check: impl Fn(&Case<'_>, &Path)) {
    let folder = TempDir::new().unwrap();
    let (out, seed) = (folder.path().to_str().unwrap(), fresh_seed(class));
    oracle("encoders.py", &[out, &seed, "--classes", class]);
    let cases = entries(&folder.path().join("cases.json"));
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 8, "{class} has {} cases", cases.len());
    for entry in cases {
        let (kind, tolerance) = match entry["dtype"].as_str().unwrap() {
            "float32" => (Kind::Float, LOSS),
            _ => (Kind::BFloat16, BFLOAT16.0),
        };
        let folder = folder.path().join(entry["name"].as_str().unwrap());
        let expected = SafeTensors::open(folder.join("case.safetensors")).unwrap();
        check(&Case { entry, expected, kind, tolerance }, &folder.join("encoder"));
    }
}

struct Case<'c> {
    entry: &'c Value,
    expected: SafeTensors,
    kind: Kind,
    tolerance: f64,
}

impl Case<'_> {
    fn tensor(&self, name: &str) -> Tensor {
        self.expected.read(name).unwrap()
    }

    /// The mask of a case that has one.
    fn mask(&self) -> Option<Tensor> {
        let has_mask = self.expected.tensors().iter().any(|info| info.name == "mask");
        has_mask.then(|| self.tensor("mask"))
    }

    /// Compares what was found with the tensors of these names, side by side; in bfloat16 also with
    /// what float32 gives.
    fn compare(&self, names: &[String], found: &Tensor) {
        let what = format!("{} {names:?}", self.entry["name"]);
        let of = |prefix: &str| {
            let read = |name: &String| self.expected.read(&format!("{prefix}{name}")).ok();
            let tensors: Option<Vec<Tensor>> = names.iter().map(read).collect();
            tensors.map(|tensors| Tensor::cat(&tensors, -1))
        };
        let (expected, exact) = (of("").expect("the other side's"), of("exact."));
        assert_eq!(exact.is_some(), self.kind == Kind::BFloat16, "{what}");
        assert_eq!(found.kind(), self.kind, "{what}");
        assert!(!found.requires_grad(), "{what}");
        assert_as_good([found, &expected], exact.as_ref(), self.tolerance, &what);
        let difference = relative_difference(found, &expected);
        println!("{what} in {:?}: {difference:.1e} of {:.0e}", self.kind, self.tolerance);
    }
}

/// Compares what both sides computed of some texts: every output.
fn check_texts(case: &Case<'_>, folder: &Path) {
    let encoder = TextEncoder::open(folder).unwrap();
    let (ids, mask) = (case.tensor("ids"), case.mask());
    let encoded = |output: Output| {
        let width = encoder.width(&output);
        let encoded = encoder.load(output, Device::Cpu, case.kind).unwrap();
        let encoded = encoded.encode(&ids, mask.as_ref());
        assert_eq!(encoded.size().last(), Some(&width));
        encoded
    };
    case.compare(&["last".into()], &encoded(Output::Last));
    let hidden = |layer: &usize| format!("hidden.{layer}");
    let layers = case.entry["layers"].as_u64().unwrap() as usize;
    assert_eq!(encoder.sizes().layers, layers);
    for layer in 0..=layers {
        case.compare(&[hidden(&layer)], &encoded(Output::Hidden(vec![layer])));
    }
    let subset = case.entry["subset"].as_array().unwrap();
    let subset: Vec<usize> = subset.iter().map(|layer| layer.as_u64().unwrap() as usize).collect();
    let names: Vec<String> = subset.iter().map(hidden).collect();
    case.compare(&names, &encoded(Output::Hidden(subset)));
    match case.entry["pools"].as_bool().unwrap() {
        true => case.compare(&["pooled".into()], &encoded(Output::Pooled)),
        false => assert!(encoder.load(Output::Pooled, Device::Cpu, case.kind).is_err()),
    }
}

/// Compares what both sides made of a picture and computed of some pixels.
fn check_pictures(case: &Case<'_>, folder: &Path) {
    let encoder = ImageEncoder::open(folder).unwrap();
    let loaded = encoder.load(Device::Cpu, case.kind).unwrap();
    let encoded = loaded.encode(&case.tensor("pixels"));
    assert_eq!(encoded.size()[1..], encoder.states());
    case.compare(&["last".into()], &encoded);
    let farthest = |picture: &str, input: &str| {
        let made = pixels_of(&case.tensor(picture), loaded.side());
        (made - case.tensor(input)).abs().max().double_value(&[])
    };
    let name = &case.entry["name"];
    assert!(farthest("picture", "input") < 1e-6, "{name}");
    // Two of 255 steps: bytes are rounded between rows and columns, and Pillow 13 begins with those
    // that are less work, libtorch with rows. Half a step grows by at most 1.27, the largest sum of
    // a bicubic filter's magnitudes here, and is rounded again: below 1.2 steps on each side, where
    // nothing is cut at 0 or 255 in between.
    let steps = farthest("smooth", "by_pillow") * 255.0 / 2.0;
    println!("{name} beside Pillow: {steps:.1} steps");
    assert!(steps < 2.01, "{name}: {steps}");
}

#[test]
fn t5_is_transformers() {
    check_class("T5EncoderModel", check_texts);
}

#[test]
fn umt5_is_transformers() {
    check_class("UMT5EncoderModel", check_texts);
}

#[test]
fn clip_text_is_transformers() {
    check_class("CLIPTextModel", check_texts);
}

#[test]
fn the_text_part_of_qwen2_5_vl_is_transformers() {
    check_class("Qwen2_5_VLForConditionalGeneration", check_texts);
}

#[test]
fn qwen3_is_transformers() {
    check_class("Qwen3ForCausalLM", check_texts);
}

#[test]
fn the_text_part_of_mistral3_is_transformers() {
    check_class("Mistral3ForConditionalGeneration", check_texts);
}

#[test]
fn siglip_vision_is_transformers() {
    check_class("SiglipVisionModel", check_pictures);
}
