//! Published encoders are read: every tensor finds its place, and what does not fit is told.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use fm_dist::encoder::{ImageEncoder, Output, TextClass, TextEncoder};
use fm_dist::files::safetensors;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

type Tensors = BTreeMap<String, Vec<i64>>;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders").join(name)
}

/// Names and shapes in the published files.
fn listed(name: &str) -> Tensors {
    let text = fs::read_to_string(fixture(name).join("tensors.txt")).unwrap();
    let tensor = |line: &str| {
        let (name, sides) = line.split_once(' ').unwrap();
        (name.to_string(), sides.split_whitespace().map(|side| side.parse().unwrap()).collect())
    };
    text.lines().map(tensor).collect()
}

/// Writes a file with a sound header and holes in the place of its tensors, of bfloat16.
fn write_header(path: &Path, tensors: &Tensors) {
    let (mut entries, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 2 * shape.iter().product::<i64>() as u64;
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]});
        entries.insert(name.clone(), entry);
    }
    let header = Value::Object(entries).to_string();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
}

/// The folder of a published encoder, with holes in the place of numbers.
fn hollow(name: &str, tensors: &Tensors) -> TempDir {
    let root = TempDir::new().unwrap();
    fs::copy(fixture(name).join("config.json"), root.path().join("config.json")).unwrap();
    write_header(&root.path().join("model.safetensors"), tensors);
    root
}

/// Published text encoders with the outputs that their pipelines take, the number of parameters
/// that those need, and the width of the outputs.
fn published() -> Vec<(&'static str, Output, i64, i64)> {
    vec![
        ("flux1-t5", Output::Last, 4_762_310_656, 4096),
        ("flux1-clip", Output::Pooled, 123_060_480, 768),
        ("flux2-dev", Output::Hidden(vec![10, 20, 30]), 17_343_754_240, 15_360),
        ("flux2-klein-4b", Output::Hidden(vec![9, 18, 27]), 3_114_088_192, 7680),
        ("flux2-klein-9b", Output::Hidden(vec![9, 18, 27]), 5_831_883_520, 12_288),
        ("qwen-image", Output::Last, 7_070_619_136, 3584),
        ("wan", Output::Last, 5_680_910_336, 4096),
        ("hunyuanvideo1.5-qwen", Output::Hidden(vec![26]), 6_604_499_968, 3584),
        ("hunyuanvideo1.5-byt5", Output::Last, 219_314_944, 1472),
    ]
}

#[test]
fn every_tensor_of_the_published_text_encoders_finds_its_place() {
    for (name, output, parameters, width) in published() {
        let root = hollow(name, &listed(name));
        let encoder = TextEncoder::open(root.path()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(encoder.num_params(&output).unwrap(), parameters, "{name}");
        assert_eq!(encoder.width(&output), width, "{name}");
    }
}

#[test]
fn every_tensor_of_the_published_image_encoder_finds_its_place() {
    let name = "hunyuanvideo1.5-siglip";
    let root = hollow(name, &listed(name));
    let encoder = ImageEncoder::open(root.path()).unwrap();
    assert_eq!(encoder.states(), [729, 1152]);
    let numel = |tensors: &Tensors| -> i64 {
        tensors.values().map(|shape| shape.iter().product::<i64>()).sum()
    };
    let read = numel(&encoder.class().tensors());
    let mut head = listed(name);
    head.retain(|name, _| name.starts_with("vision_model.head."));
    assert_eq!(read + numel(&head), 428_225_600);
}

/// Each way in which the names of a published file begin.
#[test]
fn names_of_other_versions_find_their_place() {
    let renamed = |name: &str, [old, new]: [&str; 2]| -> Tensors {
        let names = listed(name).into_iter();
        let moved = |name: String| match name.strip_prefix(old) {
            Some(rest) => format!("{new}{rest}"),
            None => name,
        };
        names.map(|(name, shape)| (moved(name), shape)).collect()
    };
    for (name, prefixes) in [
        ("qwen-image", ["model.", "model.language_model."]),
        ("qwen-image", ["visual.", "model.visual."]),
        ("flux2-dev", ["language_model.model.", "model.language_model."]),
        ("flux2-klein-4b", ["model.", ""]),
        ("flux1-clip", ["text_model.", ""]),
        ("flux1-t5", ["shared.", "encoder.embed_tokens."]),
    ] {
        let root = hollow(name, &renamed(name, prefixes));
        TextEncoder::open(root.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let tensors = renamed("hunyuanvideo1.5-siglip", ["vision_model.", ""]);
    ImageEncoder::open(hollow("hunyuanvideo1.5-siglip", &tensors).path()).unwrap();
}

/// A folder of a tiny text encoder with these weights.
fn tiny(config: &Value, tensors: &BTreeMap<String, Tensor>) -> TempDir {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("config.json"), config.to_string()).unwrap();
    let tensors: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = File::create(root.path().join("model.safetensors")).unwrap();
    safetensors::write(&mut file, &tensors, &BTreeMap::new()).unwrap();
    root
}

fn clip() -> Value {
    json!({
        "architectures": ["CLIPTextModel"], "hidden_size": 4, "intermediate_size": 6,
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10, "eos_token_id": 9,
        "max_position_embeddings": 7,
    })
}

fn clip_weights() -> BTreeMap<String, Tensor> {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("config.json"), clip().to_string()).unwrap();
    let shapes = TextClass::read(root.path()).unwrap().tensors();
    let ones = |shape: Vec<i64>| Tensor::ones(shape, (Kind::BFloat16, Device::Cpu));
    shapes.into_iter().map(|(name, shape)| (format!("text_model.{name}"), ones(shape))).collect()
}

#[test]
fn weights_of_an_encoder_that_do_not_fit_are_listed() {
    let mut tensors = clip_weights();
    assert!(TextEncoder::open(tiny(&clip(), &tensors).path()).is_ok());
    let moved = tensors.remove("text_model.final_layer_norm.bias").unwrap();
    tensors.insert("text_model.final_layer_norm.offset".into(), moved);
    tensors.insert("visual_projection.weight".into(), Tensor::from(1f32));
    let ids = Tensor::from_slice(&[1i64; 12]).view([3, 4]);
    tensors.insert("text_model.encoder.layers.1.self_attn.q_proj.weight".into(), ids);
    let error = TextEncoder::open(tiny(&clip(), &tensors).path()).unwrap_err();
    let text = error.to_string();
    for part in [
        "missing: text_model.final_layer_norm.bias",
        "unexpected: text_model.final_layer_norm.offset, visual_projection.weight",
        "text_model.encoder.layers.1.self_attn.q_proj.weight is Int64 [3, 4] instead of Float or \
         BFloat16 or Half [4, 4]",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains('\n') && error.exit_code() == 40, "{text}");
}

#[test]
fn what_an_encoder_cannot_give_is_told() {
    let root = tiny(&clip(), &clip_weights());
    let encoder = TextEncoder::open(root.path()).unwrap();
    let said = |output| {
        let error = encoder.load(output, Device::Cpu, Kind::Float).unwrap_err().to_string();
        error.split_once(": ").unwrap().1.to_string()
    };
    let beyond = "this CLIPTextModel has the states after 0 to 2 layers, not 3";
    assert!(said(Output::Hidden(vec![1, 3])).ends_with(beyond));
    assert!(said(Output::Hidden(Vec::new())).ends_with("no states are asked for"));

    let mut tensors = clip_weights();
    let broken = Tensor::full([4], f64::INFINITY, (Kind::Float, Device::Cpu));
    tensors.insert("text_model.encoder.layers.1.layer_norm1.bias".into(), broken);
    let root = tiny(&clip(), &tensors);
    let encoder = TextEncoder::open(root.path()).unwrap();
    let error = encoder.load(Output::Pooled, Device::Cpu, Kind::Float).unwrap_err().to_string();
    let expected =
        "`text_model.encoder.layers.1.layer_norm1.bias` holds numbers that are not finite";
    assert!(error.contains(expected), "{error}");
    // A layer that is not needed is not read.
    encoder.load(Output::Hidden(vec![1]), Device::Cpu, Kind::Float).unwrap();
}

#[test]
fn a_text_encoders_folder_of_pickles_is_told_how_to_convert_them() {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("config.json"), clip().to_string()).unwrap();
    fs::write(root.path().join("pytorch_model.bin"), "").unwrap();
    let error = TextEncoder::open(root.path()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("to model.safetensors beside their config.json: python3"), "{text}");
    assert_eq!(error.exit_code(), 51);
}

#[test]
#[should_panic(expected = "the text encoder has 10 tokens, and none of the id 10")]
fn an_id_outside_the_vocabulary_is_a_bug_of_the_caller() {
    let root = tiny(&clip(), &clip_weights());
    let encoder = TextEncoder::open(root.path()).unwrap();
    let encoder = encoder.load(Output::Last, Device::Cpu, Kind::Float).unwrap();
    let _ = encoder.encode(&Tensor::from_slice(&[3i64, 10]).view([1, 2]), None);
}

#[test]
#[should_panic(expected = "the text encoder takes 7 tokens at most, not 8")]
fn a_text_longer_than_places_is_a_bug_of_the_caller() {
    let root = tiny(&clip(), &clip_weights());
    let encoder = TextEncoder::open(root.path()).unwrap();
    let encoder = encoder.load(Output::Last, Device::Cpu, Kind::Float).unwrap();
    let _ = encoder.encode(&Tensor::from_slice(&[3i64; 8]).view([1, 8]), None);
}
