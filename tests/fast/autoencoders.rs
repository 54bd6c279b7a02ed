//! Published autoencoders are read: every tensor finds its place, and what does not fit is told.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::autoencoder::{Autoencoder, AutoencoderClass, Estimate, Factors, Tile};
use fm_dist::files::safetensors;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

/// Counters of PyTorch, which nothing reads.
const COUNTER: &str = "bn.num_batches_tracked";

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/autoencoders").join(name)
}

/// Names and shapes as diffusers builds the class.
fn listed(name: &str) -> BTreeMap<String, Vec<i64>> {
    let text = fs::read_to_string(folder(name).join("tensors.txt")).unwrap();
    let tensor = |line: &str| {
        let (name, sides) = line.split_once(' ').unwrap_or((line, ""));
        (name.to_string(), sides.split_whitespace().map(|side| side.parse().unwrap()).collect())
    };
    text.lines().map(tensor).filter(|(name, _)| name != COUNTER).collect()
}

#[test]
fn every_tensor_of_the_published_autoencoders_finds_its_place() {
    let published = ["flux1", "flux2", "wan2.1", "wan2.2-ti2v-5b", "qwen-image", "hunyuanvideo1.5"];
    for name in published {
        let (found, expected) =
            (AutoencoderClass::read(&folder(name)).unwrap().tensors(), listed(name));
        for (tensor, shape) in &expected {
            assert_eq!(found.get(tensor), Some(shape), "{name}: {tensor}");
        }
        let others: Vec<&String> =
            found.keys().filter(|tensor| !expected.contains_key(*tensor)).collect();
        assert!(others.is_empty(), "{name} has no {others:?}");
    }
}

#[test]
fn published_autoencoders_have_the_factors_of_their_pipelines() {
    let videos = |channels, space| Factors { colours: 3, channels, space, time: Some(4) };
    let pictures = |channels, space| Factors { time: None, ..videos(channels, space) };
    let published = [
        ("flux1", pictures(16, 8), Estimate::Sample, 1024),
        ("flux2", pictures(128, 16), Estimate::Mean, 1024),
        ("wan2.1", videos(16, 8), Estimate::Mean, 256),
        ("wan2.2-ti2v-5b", videos(48, 16), Estimate::Mean, 256),
        ("qwen-image", videos(16, 8), Estimate::Sample, 256),
        ("hunyuanvideo1.5", videos(32, 16), Estimate::Mean, 256),
    ];
    for (name, factors, estimate, side) in published {
        let class = AutoencoderClass::read(&folder(name)).unwrap();
        assert_eq!((class.factors(), class.estimate()), (factors, estimate), "{name}");
        assert_eq!((class.tile().side, class.tile().stride), (side, side * 3 / 4), "{name}");
    }
}

/// A folder with FLUX.1's architecture at tiny widths, and with these weights.
fn tiny(tensors: &BTreeMap<String, Tensor>) -> TempDir {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("config.json"), TINY).unwrap();
    let tensors: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let path = root.path().join("diffusion_pytorch_model.safetensors");
    safetensors::write(&mut fs::File::create(path).unwrap(), &tensors, &BTreeMap::new()).unwrap();
    root
}

const TINY: &str = r#"{"_class_name": "AutoencoderKL", "block_out_channels": [4],
    "norm_num_groups": 2, "sample_size": 30, "latents_mean": null, "force_upcast": true}"#;

fn tiny_weights() -> BTreeMap<String, Tensor> {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("config.json"), TINY).unwrap();
    let shapes = AutoencoderClass::read(root.path()).unwrap().tensors();
    let ones = |shape: Vec<i64>| Tensor::ones(shape, (Kind::BFloat16, Device::Cpu));
    shapes.into_iter().map(|(name, shape)| (name, ones(shape))).collect()
}

#[test]
fn weights_that_do_not_fit_are_listed() {
    let said = |folder: &TempDir| Autoencoder::open(folder.path()).unwrap_err().to_string();
    assert!(Autoencoder::open(tiny(&tiny_weights()).path()).is_ok());
    let mut tensors = tiny_weights();
    let moved = tensors.remove("encoder.conv_in.bias").unwrap();
    tensors.insert("encoder.conv_in.offset".into(), moved);
    tensors.insert("quant_conv.bias".into(), Tensor::ones([2], (Kind::Float, Device::Cpu)));
    let text = said(&tiny(&tensors));
    for part in [
        "missing: encoder.conv_in.bias",
        "unexpected: encoder.conv_in.offset",
        "quant_conv.bias is Float [2] instead of Float or BFloat16 or Half [8]",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains('\n'), "{text}");
}

#[test]
fn numbers_that_are_none_and_tiles_that_do_not_fit_are_told() {
    let mut tensors = tiny_weights();
    let broken = Tensor::full([4], f64::NAN, (Kind::Float, Device::Cpu));
    tensors.insert("decoder.conv_norm_out.bias".into(), broken);
    let root = tiny(&tensors);
    let autoencoder = Autoencoder::open(root.path()).unwrap();
    let text = autoencoder.decoder(Device::Cpu, Kind::Float).unwrap_err().to_string();
    assert!(text.contains("`decoder.conv_norm_out.bias` holds numbers that are not finite"));

    let encoder = autoencoder.encoder(Device::Cpu, Kind::Float).unwrap();
    let pixels = Tensor::zeros([1, 3, 6, 5], (Kind::Float, Device::Cpu));
    let posterior = encoder.encode(&pixels);
    assert_eq!(posterior.mean.size(), [1, 4, 6, 5]);
    assert!(!posterior.mean.requires_grad());
    let tile = Tile { side: 8, stride: 9 };
    let text = encoder.tiled(Some(tile)).unwrap_err().to_string();
    assert!(text.ends_with(": tiles of 8 pixels cannot be 9 apart"), "{text}");
}

#[test]
#[should_panic(expected = "the encoder takes pixels [3, H, W], not [4, 8, 8]")]
fn pixels_of_another_number_of_colours_are_a_bug_of_the_caller() {
    let root = tiny(&tiny_weights());
    let autoencoder = Autoencoder::open(root.path()).unwrap();
    let encoder = autoencoder.encoder(Device::Cpu, Kind::Float).unwrap();
    encoder.encode(&Tensor::zeros([1, 4, 8, 8], (Kind::Float, Device::Cpu)));
}
