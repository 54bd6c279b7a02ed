//! The autoencoders are diffusers': moments, pixels, tiles and scaling of tiny random ones, new
//! ones each run.

use std::path::Path;

use fm_dist::autoencoder::{Autoencoder, Decoder, Encoder, Tile};
use fm_dist::files::safetensors::SafeTensors;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{
    BFLOAT16, LOSS, assert_as_good, entries, fresh_seed, oracle, relative_difference,
};

/// New cases of one class.
fn check_class(class: &str) {
    let folder = TempDir::new().unwrap();
    let (out, seed) = (folder.path().to_str().unwrap(), fresh_seed(class));
    oracle("autoencoders.py", &[out, &seed, "--classes", class]);
    let cases = entries(&folder.path().join("cases.json"));
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 6, "{class} has {} cases", cases.len());
    for case in cases {
        check_case(case, &folder.path().join(case["name"].as_str().unwrap()));
    }
}

struct Case<'c> {
    entry: &'c Value,
    expected: SafeTensors,
    tolerance: f64,
}

impl Case<'_> {
    fn tensor(&self, name: &str) -> Tensor {
        self.expected.read(name).unwrap()
    }

    fn compare(&self, name: &str, found: &Tensor) {
        let tolerance =
            if ["model_latents", "unscaled"].contains(&name) { LOSS } else { self.tolerance };
        let (what, expected) = (format!("{} {name}", self.entry["name"]), self.tensor(name));
        let exact = self.expected.read(&format!("exact.{name}")).ok();
        assert_as_good([found, &expected], exact.as_ref(), tolerance, &what);
        let difference = relative_difference(found, &expected);
        println!("{what} in {}: {difference:.1e} of {tolerance:.0e}", self.entry["dtype"]);
    }

    /// `prefix`: `tiled_` if both work in tiles.
    fn compare_halves(&self, prefix: &str, encoder: &Encoder, decoder: &Decoder) {
        let posterior = encoder.encode(&self.tensor("pixels"));
        self.compare(&format!("{prefix}mean"), &posterior.mean);
        self.compare(&format!("{prefix}log_variance"), &posterior.log_variance);
        self.compare(&format!("{prefix}decoded"), &decoder.decode(&self.tensor("latents")));
    }
}

/// Compares what both sides computed of one case.
fn check_case(entry: &Value, folder: &Path) {
    let (kind, tolerance) = match entry["dtype"].as_str().unwrap() {
        "float32" => (Kind::Float, LOSS),
        _ => (Kind::BFloat16, BFLOAT16.0),
    };
    let expected = SafeTensors::open(folder.join("case.safetensors")).unwrap();
    let case = Case { entry, expected, tolerance };
    let autoencoder = Autoencoder::open(&folder.join("vae")).unwrap();
    let encoder = autoencoder.encoder(Device::Cpu, kind).unwrap();
    let decoder = autoencoder.decoder(Device::Cpu, kind).unwrap();
    case.compare_halves("", &encoder, &decoder);
    case.compare("model_latents", &encoder.to_model(&case.tensor("mean")));
    case.compare("unscaled", &decoder.to_autoencoder(&case.tensor("model_input")));

    let (pixels, of_model) = (case.tensor("pixels").size(), case.tensor("model_latents").size());
    assert_eq!(autoencoder.factors().latents(&pixels[1..]), Ok(of_model[1..].to_vec()));

    let length = |name: &str| entry["tile"][name].as_i64().unwrap();
    let tile = Tile { side: length("side"), stride: length("stride") };
    // The classes of pictures have the case's tile as their own.
    let tile = Some(tile).filter(|_| autoencoder.factors().time.is_some());
    case.compare_halves("tiled_", &encoder.tiled(tile).unwrap(), &decoder.tiled(tile).unwrap());
}

#[test]
fn autoencoder_kl_is_diffusers() {
    check_class("AutoencoderKL");
}

#[test]
fn autoencoder_kl_flux2_is_diffusers() {
    check_class("AutoencoderKLFlux2");
}

#[test]
fn autoencoder_kl_wan_is_diffusers() {
    check_class("AutoencoderKLWan");
}

#[test]
fn autoencoder_kl_qwen_image_is_diffusers() {
    check_class("AutoencoderKLQwenImage");
}

#[test]
fn autoencoder_kl_hunyuan_video15_is_diffusers() {
    check_class("AutoencoderKLHunyuanVideo15");
}
