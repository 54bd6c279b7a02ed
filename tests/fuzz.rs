//! Whatever stands in a file that comes from outside, reading it ends in a value or in one line: no
//! panic, at most 64 MiB, at most a second.
//!
//! `FM_DIST_FUZZ_SECONDS` says how long all readers together are tried (20 without it;
//! `launch/soak.sh` takes its time) and `FM_DIST_FUZZ_SEED` with which seed, so that what was found
//! is found again. An input that breaks a reader is kept in target/fuzz/; one that ends the whole
//! process lies there as `<reader>.input`.
#![allow(clippy::unwrap_used)]

#[path = "fuzz/archive.rs"]
mod archive;
#[path = "fuzz/clock.rs"]
mod clock;
#[path = "fuzz/hunt.rs"]
mod hunt;
#[path = "fuzz/mutation.rs"]
mod mutation;
#[path = "fuzz/tokenizers.rs"]
mod tokenizers;

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use fm_dist::autoencoder::AutoencoderClass;
use fm_dist::collective::Solo;
use fm_dist::commands::{StepRequest, dump_step};
use fm_dist::config::{DEFAULT, RunConfig};
use fm_dist::data::{Dataset, Order};
use fm_dist::datasets::pictures::{self, BucketOptions, CaptionOptions, PictureOptions};
use fm_dist::encoder::{Siglip, TextClass};
use fm_dist::error::Error;
use fm_dist::files::outputs::Named;
use fm_dist::files::pickle::{self, PickledFile};
use fm_dist::files::safetensors::{SafeTensors, write};
use fm_dist::lora;
use fm_dist::media::{Limits, Picture, Size, picture_size};
use fm_dist::sample::prompts::read_prompts;
use fm_dist::sample::{SampleRequest, sample};
use fm_dist::train::{TrainOptions, train};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use archive::{Described, SOUND, numbers, pickle as pickled, saved, text};
use hunt::{Prey, hunt, turn};

/// Seconds that all readers together are tried for.
const SECONDS: u64 = 20;
const READERS: u64 = 20;

/// Words of every format that is built on JSON and safetensors.
const WORDS: &[&[u8]] = &[
    b"__metadata__",
    b"dtype",
    b"shape",
    b"data_offsets",
    b"F32",
    b"F16",
    b"BF16",
    b"F64",
    b"I64",
    b"U8",
    b"BOOL",
    b"F8_E4M3",
    b"F8_E5M2",
    b"image_latents",
    b"video_latents",
    b"text_embeddings",
    b"negative.text_embeddings",
    b"noise",
    b"condition_latents",
    b"text_mask",
    b"loss_mask",
    b"sigma",
    b"data_type",
    b"task_type",
    b"image",
    b"video",
    b"i2v",
    b"t2v",
    b"format",
    b"version",
    b"files",
    b"path",
    b"samples",
    b"group",
    b"sha256",
    b"conditions",
    b"names",
    b"empty_prompt",
    b"captions",
    b"text_embeddings.lengths",
    b"text_embeddings.scale",
    b"single",
    b"unequal",
    b"d.safetensors",
    b"e.jsonl",
    b"parts",
    b"file",
    b"bytes",
    b"step",
    b"guard",
    b"losses",
    b"a.safetensors",
    b"model-00001-of-00001.safetensors",
    b"[]",
    b"[1,1]",
];

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number"))
    })
}

/// Tries a reader for its share of the time; panics with what was found and how to find it again.
fn hunted(prey: &Prey<'_>) {
    let (seed, seconds) =
        (setting("FM_DIST_FUZZ_SEED", 1), setting("FM_DIST_FUZZ_SECONDS", SECONDS));
    match hunt(prey, seed, Duration::from_millis(1000 * seconds / READERS)) {
        Ok(hunted) => println!("{} with FM_DIST_FUZZ_SEED={seed}: {hunted:?}", prey.name),
        Err(finding) => panic!(
            "{}: {} (kept as {}, FM_DIST_FUZZ_SEED={seed})",
            prey.name,
            finding.what,
            finding.input.display()
        ),
    }
}

/// What a person would read of an error.
fn told<T>(outcome: Result<T, Error>) -> Result<(), String> {
    outcome.map(drop).map_err(|error| error.to_string())
}

fn as_it_is(bytes: Vec<u8>) -> Vec<u8> {
    bytes
}

// Safetensors.

/// A file of these tensors.
fn file(tensors: &[(&str, Tensor)], metadata: &[(&str, &str)]) -> Vec<u8> {
    let tensors: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let metadata = metadata.iter().map(|(key, text)| (key.to_string(), text.to_string())).collect();
    let mut bytes = Vec::new();
    write(&mut bytes, &tensors, &metadata).unwrap();
    bytes
}

/// A length that fits the header, and as many bytes of data as the header says.
fn fitted(bytes: Vec<u8>) -> Vec<u8> {
    let rest = bytes.get(8..).unwrap_or_default();
    let Some(end) = rest.windows(2).position(|two| two == b"}}").map(|place| place + 2) else {
        return bytes;
    };
    let end = end + rest[end..].iter().take_while(|byte| **byte == b' ').count();
    let (header, mut data) = (&rest[..end], rest[end..].to_vec());
    if let Ok(Value::Object(entries)) = serde_json::from_slice(header) {
        let ends = entries.values().filter_map(|entry| entry.get("data_offsets")?.get(1)?.as_u64());
        data.resize(ends.max().filter(|end| *end < 1 << 20).unwrap_or(64) as usize, 0);
    }
    [&(header.len() as u64).to_le_bytes(), header, &data].concat()
}

fn ones(shape: &[i64]) -> Tensor {
    Tensor::ones(shape, (Kind::Float, Device::Cpu))
}

fn read_safetensors(path: &Path) -> Result<(), Error> {
    let file = SafeTensors::open(path)?;
    for info in file.tensors() {
        let whole = file.read(&info.name)?;
        if let Some(&rows) = info.shape.first() {
            assert!(
                file.read_rows(&info.name, &[0, rows as u64 - 1])?.size()[0] == 2
                    && whole.size() == info.shape
            );
        }
    }
    Ok(())
}

#[test]
fn safetensors_are_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.safetensors");
    let kinds = [Kind::Bool, Kind::Uint8, Kind::Int64, Kind::Half, Kind::BFloat16, Kind::Double];
    let names = ["a", "b.weight", "c", "d", "e", "f"];
    let many: Vec<(&str, Tensor)> = names
        .into_iter()
        .zip(kinds)
        .map(|(name, kind)| (name, ones(&[2, 3]).to_kind(kind)))
        .collect();
    let sound = vec![
        file(&[("image_latents", ones(&[4, 1, 2, 2]))], &[]),
        file(&many, &[("step", "7"), ("data_type", "image")]),
        file(
            &[("scalar", Tensor::from(1.0f32)), ("text_embeddings", ones(&[2, 1, 3]))],
            &[("", "")],
        ),
    ];
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        told(read_safetensors(&path))
    };
    hunted(&Prey { name: "safetensors", sound, words: WORDS, dress: &fitted, read: &read });
}

// Autoencoders.

/// Words of an autoencoder's `config.json`.
const AUTOENCODER_WORDS: &[&[u8]] = &[
    b"AutoencoderKL",
    b"AutoencoderKLFlux2",
    b"AutoencoderKLWan",
    b"AutoencoderKLQwenImage",
    b"AutoencoderKLHunyuanVideo15",
    b"block_out_channels",
    b"decoder_block_out_channels",
    b"dim_mult",
    b"temperal_downsample",
    b"is_residual",
    b"patch_size",
    b"true",
    b"null",
    b"65536",
    b"[]",
    b"[1,1]",
];

#[test]
fn an_autoencoders_configuration_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/autoencoders");
    let entries = fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path());
    let sound: Vec<Vec<u8>> =
        entries.map(|entry| fs::read(entry.join("config.json")).unwrap()).collect();
    let read = |bytes: &[u8]| {
        fs::write(folder.path().join("config.json"), bytes).unwrap();
        told(AutoencoderClass::read(folder.path()).map(|class| {
            assert!(!class.tensors().is_empty());
            class.factors().latents(&[3, 64, 64])
        }))
    };
    hunted(&Prey {
        name: "autoencoder",
        sound,
        words: AUTOENCODER_WORDS,
        dress: &as_it_is,
        read: &read,
    });
}

// Encoders.

/// Words of an encoder's `config.json`.
const ENCODER_WORDS: &[&[u8]] = &[
    b"T5EncoderModel",
    b"UMT5EncoderModel",
    b"CLIPTextModel",
    b"Qwen2_5_VLForConditionalGeneration",
    b"Qwen3ForCausalLM",
    b"Mistral3ForConditionalGeneration",
    b"SiglipVisionModel",
    b"architectures",
    b"model_type",
    b"text_config",
    b"rope_parameters",
    b"rope_scaling",
    b"quantization_config",
    b"num_hidden_layers",
    b"head_dim",
    b"true",
    b"null",
    b"262144",
    b"{}",
    b"[]",
];

#[test]
fn an_encoders_configuration_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders");
    let entries = fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path());
    let sound: Vec<Vec<u8>> =
        entries.map(|entry| fs::read(entry.join("config.json")).unwrap()).collect();
    let read = |bytes: &[u8]| {
        fs::write(folder.path().join("config.json"), bytes).unwrap();
        let tensors = TextClass::read(folder.path())
            .map(|class| class.tensors())
            .or_else(|_| Siglip::read(folder.path()).map(|class| class.tensors()));
        told(tensors.map(|tensors| assert!(!tensors.is_empty())))
    };
    hunted(&Prey { name: "encoder", sound, words: ENCODER_WORDS, dress: &as_it_is, read: &read });
}

// Pictures.

/// Most pixels of a picture here: one takes 14 bytes a pixel while it is read.
const PIXELS: u64 = 1 << 20;

/// Words of PNG, JPEG and WebP.
const PICTURE_WORDS: &[&[u8]] = &[
    b"IHDR",
    b"PLTE",
    b"tRNS",
    b"eXIf",
    b"iCCP",
    b"acTL",
    b"IDAT",
    b"IEND",
    b"VP8 ",
    b"VP8L",
    b"VP8X",
    b"ALPH",
    b"ANIM",
    b"ANMF",
    b"EXIF",
    b"Exif\0\0MM\0*",
    b"\xff\xc0",
    b"\xff\xc2",
    b"\xff\xc4",
    b"\xff\xda",
    b"\xff\xd9",
    b"\xff\xee\0\x0eAdobe",
    b"\0\0\x04\0",
    b"\xff\xff\xff\xff",
];

fn sound_pictures() -> Vec<Vec<u8>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pictures");
    let mut paths: Vec<PathBuf> =
        fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// Checksums that fit the chunks of a PNG.
fn with_checksums(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut place = if bytes.starts_with(PNG) { PNG.len() } else { bytes.len() };
    while let Some(length) = bytes.get(place..place + 4) {
        let length = u32::from_be_bytes(length.try_into().unwrap()) as usize;
        let Some(data) = bytes.get(place + 4..place + 8 + length) else { break };
        let checksum = crc32fast::hash(data).to_be_bytes();
        place += 8 + length;
        let Some(old) = bytes.get_mut(place..place + 4) else { break };
        old.copy_from_slice(&checksum);
        place += 4;
    }
    bytes
}

#[test]
fn a_picture_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.png");
    let limits = Limits { pixels: PIXELS, bytes: 16 << 20 };
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let size = picture_size(&path, &limits);
        let picture = Picture::read(&path, &limits);
        if let (Ok(size), Ok(picture)) = (&size, &picture) {
            assert_eq!(*size, picture.size());
        }
        told(size).and(told(picture))
    };
    let dress: &dyn Fn(Vec<u8>) -> Vec<u8> = &with_checksums;
    let (name, words) = ("picture", PICTURE_WORDS);
    hunted(&Prey { name, sound: sound_pictures(), words, dress, read: &read });
}

fn png_chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [&length[..], name, data, &[0; 4]].concat()
}

fn deflated(zeros: u64) -> Vec<u8> {
    let mut out = ZlibEncoder::new(Vec::new(), Compression::best());
    io::copy(&mut io::repeat(0).take(zeros), &mut out).unwrap();
    out.finish().unwrap()
}

/// A PNG of black and white pixels, with further chunks.
fn black_png(side: u32, further: &[u8]) -> Vec<u8> {
    let sides = [side.to_be_bytes(), side.to_be_bytes()].concat();
    let head = png_chunk(b"IHDR", &[&sides[..], &[1, 0, 0, 0, 0]].concat());
    let data = png_chunk(b"IDAT", &deflated(u64::from(side) * u64::from(side.div_ceil(8) + 1)));
    with_checksums([PNG, &head, further, &data, &png_chunk(b"IEND", b"")].concat())
}

/// Small files that hold much or say so: each is refused at the cost of any other input.
#[test]
fn a_picture_larger_than_it_may_be_costs_nothing() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.png");
    let [jpeg, webp] = ["baseline.jpg", "alpha.webp"].map(|name| {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pictures");
        fs::read(fixtures.join(name)).unwrap()
    });
    let frame = jpeg.windows(2).position(|two| two == [0xff, 0xc0]).unwrap();
    let mut lying_jpeg = jpeg.clone();
    lying_jpeg[frame + 5..frame + 9].fill(0xff);
    let mut lying_webp = webp.clone();
    let lossless = webp.windows(4).position(|four| four == b"VP8L").unwrap();
    lying_webp[lossless + 9..lossless + 13].copy_from_slice(&[0xfe, 0xbf, 0xff, 0x1f]);
    let beyond = [black_png(10_000, b""), lying_jpeg, lying_webp];
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let limits = Limits::default();
        match (picture_size(&path, &limits), Picture::read(&path, &limits)) {
            (Err(one), Err(other)) if one.to_string() == other.to_string() => {
                let is_beyond = one.to_string().contains("pixels; at most 67108864 are read");
                if is_beyond { Ok(()) } else { Err(one.to_string()) }
            }
            other => Err(format!("{other:?}")),
        }
    };
    let name = "large-picture";
    let prey =
        Prey { name, sound: beyond.into(), words: PICTURE_WORDS, dress: &as_it_is, read: &read };
    println!("{:?}", hunt(&prey, 1, Duration::ZERO).unwrap());

    // A colour profile of 96 MiB is not unpacked whole.
    let profile = [b"a\0\0", &deflated(96 << 20)[..]].concat();
    let bloated = vec![black_png(64, &png_chunk(b"iCCP", &profile))];
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let _ = Picture::read(&path, &Limits::default());
        Ok(())
    };
    let prey = Prey { sound: bloated, read: &read, ..prey };
    println!("{:?}", hunt(&prey, 1, Duration::ZERO).unwrap());
}

// Captions.

/// Words of lists of captions.
const CAPTION_WORDS: &[&[u8]] = &[
    b"file_name",
    b"image_path",
    b"caption",
    b"captions",
    b"text",
    b"items",
    b"data",
    b"a.png",
    b"./a.png",
    b"../a.png",
    b"[trigger]",
    b",",
    b"\"",
    b"\xef\xbb\xbf",
];

/// Names of files that hold a picture's captions.
const CAPTION_FILES: [&str; 5] = ["captions.json", "metadata.jsonl", "meta.csv", "a.txt", "a.json"];

#[test]
fn captions_are_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("a.png"), black_png(16, b"")).unwrap();
    let options = PictureOptions {
        folder: folder.path().into(),
        frames: None,
        captions: CaptionOptions { shuffle_tags: true, ..CaptionOptions::default() },
        masks: None,
        controls: Vec::new(),
        buckets: BucketOptions::One(Size::new(16, 16)),
        ffmpeg: None,
        limits: Limits::default(),
        most_bad: 0.0,
        jobs: 1,
    };
    let read_as = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let found = pictures::find(&options);
        fs::remove_file(path).unwrap();
        found.map(|found| assert!(!found.items[0].captions.is_empty()))
    };
    // Sound in one of the formats, and told well in all others.
    let read = |bytes: &[u8]| {
        let outcomes = CAPTION_FILES.map(|name| told(read_as(name, bytes)));
        let taken = outcomes.iter().any(Result::is_ok);
        let longest = outcomes.into_iter().filter_map(Result::err).max_by_key(String::len);
        if taken { Ok(()) } else { Err(longest.unwrap_or_default()) }
    };
    let sound: [&[u8]; 5] = [
        br#"{"a.png": ["one, two", "three"], "b.png": {"caption": "four", "tags": [1, {}]}}"#,
        b"{\"file_name\": \"a.png\", \"caption\": \"one\"}\n{\"file_name\": \"b.png\"}\n",
        b"file_name,caption\na.png,\"one, two\"\nb.png,three\n",
        b"one, two, three",
        br#"{"items": [{"image_path": "a.png", "captions": ["one", "two"]}]}"#,
    ];
    let sound = sound.map(<[u8]>::to_vec).into();
    let (name, words) = ("captions", CAPTION_WORDS);
    hunted(&Prey { name, sound, words, dress: &as_it_is, read: &read });
}

// LoRAs.

/// Parts of names in LoRAs, and of their metadata.
const LORA_WORDS: &[&[u8]] = &[
    b"__metadata__",
    b"lora_adapter_metadata",
    b"ss_network_dim",
    b"transformer.",
    b"diffusion_model.",
    b"lora_unet_",
    b"base_model.model.",
    b".lora_A.weight",
    b".lora_down.weight",
    b".lora_magnitude_vector",
    b".dora_scale",
    b".alpha",
    b"blocks.0.attn1.to_q",
    b"double_blocks_0_img_attn_qkv",
    b"final_layer_adaLN_modulation_1",
    b"\\\"rank_pattern\\\":{",
    b"[6,2]",
    b"F32",
];

#[test]
fn a_lora_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("lora.safetensors");
    let pair = |stem: &str, halves: [&str; 2], outputs: i64| {
        halves
            .map(|half| format!("{stem}{half}"))
            .into_iter()
            .zip([ones(&[3, 2]), ones(&[outputs, 3])])
    };
    let sound = |tensors: Vec<(String, Tensor)>, metadata: &[(&str, &str)]| {
        let borrowed: Vec<(&str, Tensor)> =
            tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shallow_clone())).collect();
        file(&borrowed, metadata)
    };
    let kohya = [".lora_down.weight", ".lora_up.weight"];
    let config =
        r#"{"r":3,"lora_alpha":6,"rank_pattern":{"^blocks.1":4},"target_modules":["to_q"]}"#;
    let mut flux: Vec<(String, Tensor)> = pair("lora_unet_double_blocks_0_img_attn_qkv", kohya, 6)
        .chain(pair("lora_unet_single_blocks_0_linear1", kohya, 14))
        .chain(pair("lora_unet_final_layer_adaLN_modulation_1", kohya, 4))
        .collect();
    flux.push(("lora_unet_single_blocks_0_linear1.alpha".into(), Tensor::from(2.0f32)));
    flux.push(("lora_unet_single_blocks_0_linear1.dora_scale".into(), ones(&[14, 1])));
    let wan = pair("transformer.blocks.0.attn1.to_q", [".lora_A.weight", ".lora_B.weight"], 2);
    let sound = vec![
        sound(flux, &[("ss_network_dim", "3"), ("ss_base_model_version", "flux1")]),
        sound(wan.collect(), &[("lora_adapter_metadata", config)]),
    ];
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        told(lora::read(Named { argument: "--lora", path: &path }, None))
    };
    hunted(&Prey { name: "lora", sound, words: LORA_WORDS, dress: &fitted, read: &read });
}

// What torch.save writes.

/// Words of pickles: opcodes, and the names behind them.
const OPCODES: &[&[u8]] = &[
    b"(",
    b")",
    b"]",
    b"}",
    b"a",
    b"e",
    b"s",
    b"u",
    b"t",
    b"\x85",
    b"\x86",
    b"N",
    b"Q",
    b"R",
    b"h\0",
    b"q\0",
    b"K\x01",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"X\x01\0\0\x000",
    b"ctorch\nHalfStorage\n",
    b"ctorch\nSize\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch.storage\nUntypedStorage\n",
    b"ctorch\nfloat8_e5m2\n",
    b"cposix\nsystem\n",
    b".",
];

fn read_pickle(path: &Path) -> Result<(), Error> {
    let file = PickledFile::open(path)?;
    let nothing = BTreeMap::new();
    let values = file.root().entries().unwrap_or(&nothing).values().chain([file.root()]);
    for tensor in values.filter_map(pickle::Value::tensor) {
        assert_eq!(file.read(tensor)?.size(), tensor.shape);
    }
    Ok(())
}

/// Pickles with tensors, lists and references; their one storage has 24 bytes.
fn sound_pickles() -> Vec<Vec<u8>> {
    let turned = Described { offset: 1, shape: &[2, 2], strides: &[1, 3], ..SOUND };
    let parts = [
        b"}q\0(".to_vec(),
        text("latent"),
        SOUND.opcodes(),
        text("turned"),
        turned.opcodes(),
        text("prompt"),
        text("a cat"),
        text("list"),
        b"]q\x01(NK\x01\x88e".to_vec(),
        text("again"),
        b"h\x01".to_vec(),
        b"u".to_vec(),
    ];
    vec![
        pickled(&SOUND.opcodes()),
        pickled(&parts.concat()),
        pickled(&[b"ctorch\nSize\n", &numbers(&[1, 2, 3])[..], b"\x85R"].concat()),
    ]
}

/// Whole archives of these pickles; the mutations meet the directory, too.
#[test]
fn an_archive_of_torch_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.pt");
    let sound = sound_pickles().iter().map(|bytes| saved(bytes, &[("0", &[1; 24])])).collect();
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        told(read_pickle(&path))
    };
    hunted(&Prey { name: "archive", sound, words: OPCODES, dress: &as_it_is, read: &read });
}

/// Pickles in sound archives.
#[test]
fn a_pickle_is_parsed_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.pt");
    let read = |bytes: &[u8]| {
        fs::write(&path, saved(bytes, &[("0", &[1; 24])])).unwrap();
        told(read_pickle(&path))
    };
    let dress: &dyn Fn(Vec<u8>) -> Vec<u8> = &as_it_is;
    hunted(&Prey { name: "pickle", sound: sound_pickles(), words: OPCODES, dress, read: &read });
}

// A dataset's index.

/// Everything that a run asks of a dataset before its first step.
fn read_dataset(folder: &Path) -> Result<(), Error> {
    let dataset = Dataset::open(folder)?;
    let _ = (dataset.fingerprint(), dataset.verify_hashes());
    let order = Order::new(dataset.groups(), 2, 1)?;
    dataset.batch(&order.global_batch(0))?;
    dataset.conditions().map(drop)
}

#[test]
fn a_dataset_index_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let hash = "0".repeat(64);
    for (name, bytes) in [
        ("a.safetensors", file(&[("image_latents", ones(&[4, 1, 2, 2]))], &[])),
        ("b.safetensors", file(&[("image_latents", ones(&[2, 1, 4, 4]))], &[])),
        ("c.safetensors", file(&[("text_embeddings", ones(&[2, 1, 3]))], &[])),
    ] {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let entry = |path: &str, samples: u64, group: &str| json!({"path": path, "samples": samples, "group": group, "sha256": hash});
    let index = json!({
        "format": "fm-dist dataset", "version": 1, "name": "n", "source": "s", "licence": "l", "data_type": "image",
        "files": [entry("a.safetensors", 4, "2x2"), entry("b.safetensors", 2, "4x4")],
        "conditions": {"path": "c.safetensors", "names": ["x", "y"], "sha256": hash},
        "empty_prompt": {"path": "c.safetensors", "sha256": hash},
    });
    let tokens = [
        ("image_latents", ones(&[2, 1, 2, 2])),
        ("text_embeddings", ones(&[5, 3])),
        ("text_embeddings.lengths", Tensor::from_slice(&[1i64, 4])),
    ];
    fs::write(folder.path().join("d.safetensors"), file(&tokens, &[])).unwrap();
    let eight = [
        ("image_latents", ones(&[2, 1, 2, 2])),
        ("loss_mask", ones(&[2, 16, 16])),
        ("text_embeddings", ones(&[2, 4, 3]).to_kind(Kind::Float8e4m3fn)),
        ("text_embeddings.scale", ones(&[2])),
    ];
    fs::write(folder.path().join("f.safetensors"), file(&eight, &[])).unwrap();
    let third = json!({
        "format": "fm-dist dataset", "version": 2, "name": "n", "source": "s", "licence": "l",
        "data_type": "image", "files": [entry("f.safetensors", 2, "2x2")],
    });
    fs::write(folder.path().join("e.jsonl"), "{\"caption\":\"\"}\n".repeat(2)).unwrap();
    let second = json!({
        "format": "fm-dist dataset", "version": 2, "name": "n", "source": "s", "licence": "l", "data_type": "image",
        "files": [entry("d.safetensors", 2, "2x2")], "captions": {"path": "e.jsonl", "sha256": hash},
    });
    let read = |bytes: &[u8]| {
        fs::write(folder.path().join("dataset.json"), bytes).unwrap();
        told(read_dataset(folder.path()))
    };
    let second = second.to_string().into_bytes();
    let sound = vec![
        second,
        third.to_string().into_bytes(),
        index.to_string().into_bytes(),
        serde_json::to_vec_pretty(&index).unwrap(),
    ];
    hunted(&Prey { name: "dataset", sound, words: WORDS, dress: &as_it_is, read: &read });
}

/// Files of samples: kinds, lengths, scales and masks of a dataset that lists one.
#[test]
fn a_file_of_samples_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let index = json!({
        "format": "fm-dist dataset", "version": 2, "name": "n", "source": "s", "licence": "l",
        "data_type": "image",
        "files": [{"path": "a.safetensors", "samples": 2, "group": "g", "sha256": "0".repeat(64)}],
    });
    fs::write(folder.path().join("dataset.json"), index.to_string()).unwrap();
    let latents = || ("image_latents", ones(&[2, 1, 2, 2]));
    let eight = |shape: &[i64], kind| ("text_embeddings", ones(shape).to_kind(kind));
    let lengths = ("text_embeddings.lengths", Tensor::from_slice(&[1i64, 4]));
    let scale = |samples| ("text_embeddings.scale", ones(&[samples]));
    let sound = vec![
        file(&[latents(), ("loss_mask", ones(&[2, 16, 16])), ("text_mask", ones(&[2, 3]))], &[]),
        file(&[latents(), eight(&[2, 4, 3], Kind::Float8e4m3fn), scale(2)], &[]),
        file(&[latents(), eight(&[5, 3], Kind::Float8e5m2), lengths, scale(1)], &[]),
    ];
    let read = |bytes: &[u8]| {
        fs::write(folder.path().join("a.safetensors"), bytes).unwrap();
        told(read_dataset(folder.path()))
    };
    hunted(&Prey { name: "samples", sound, words: WORDS, dress: &fitted, read: &read });
}

// The configuration.

/// Lines that begin with `--set ` are overrides, the others the file. What is taken can be written
/// and is taken again.
fn read_configuration(bytes: &[u8]) -> Result<(), String> {
    // What is longer is refused for that alone, and copies made here would count.
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(1 << 20)]);
    let (overrides, lines): (Vec<&str>, Vec<&str>) =
        text.split('\n').partition(|line| line.starts_with("--set "));
    let overrides: Vec<String> =
        overrides.iter().map(|line| line["--set ".len()..].to_string()).collect();
    let config = RunConfig::read("fuzz", &lines.join("\n"), &overrides)
        .map_err(|error| error.to_string())?;
    let again = RunConfig::read("listing", &config.to_toml(), &[])
        .unwrap_or_else(|error| panic!("its own listing is refused: {error}"));
    assert!(again == config, "its own listing is another configuration");
    let _ = [1, 2, 3].map(|ranks| config.global_batch(ranks).is_ok());
    Ok(())
}

#[test]
fn a_configuration_is_read_or_refused() {
    let _turn = turn();
    let sets = "--set model.dit.width=64\n--set output_dir=runs/x\n--set log.level=\"debug\"\n--set debug.inject_fault=kill@1:3-9:data:2\n";
    let mut sound = vec![
        DEFAULT.as_bytes().to_vec(),
        format!("{DEFAULT}\n{sets}").into_bytes(),
        RunConfig::default().to_toml().into_bytes(),
    ];
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            // Weights that nobody has here.
            let text = fs::read_to_string(path).unwrap();
            let lines: Vec<&str> =
                text.lines().filter(|line| !line.starts_with("path = ")).collect();
            let config = RunConfig::read("configs", &lines.join("\n"), &[]);
            sound.extend(config.is_ok().then(|| lines.join("\n").into_bytes()));
        }
    }
    let words: &[&[u8]] = &[
        b"model",
        b"dit",
        b"flux",
        b"flux2",
        b"qwen_image",
        b"wan",
        b"hunyuan_video15",
        b"width",
        b"depth",
        b"num_heads",
        b"seed",
        b"max_steps",
        b"parallel",
        b"sharding",
        b"recompute",
        b"every_2",
        b"data",
        b"micro_batch_size_per_gpu",
        b"train",
        b"global_batch_size",
        b"optimizer.adamw",
        b"flow_matching",
        b"adapter",
        b"debug.inject_fault",
        b"\"stop@1:2:data:1\"",
        b"lr_scheduler.wsd",
        b"log",
        b"\n--set ",
        b"watchdog",
        b"1e-400",
        b"\"model.path\" = \"/dev/zero\"",
        b"[model]\npath = \"/tmp\"",
    ];
    hunted(&Prey {
        name: "configuration",
        sound,
        words,
        dress: &as_it_is,
        read: &read_configuration,
    });
}

// Checkpoints.

const SMALL: [&str; 7] = [
    "max_steps=1",
    "model.dit.width=8",
    "model.dit.num_heads=1",
    "model.dit.depth=1",
    "sampling.num_steps=1",
    "sampling.per_condition=1",
    "log.progress=\"never\"",
];

/// A small run with one checkpoint, and where its parts are.
fn run(root: &Path) -> (PathBuf, PathBuf) {
    let output = format!("output_dir={}", root.join("run").display());
    let sets: Vec<String> = SMALL.into_iter().chain([output.as_str()]).map(String::from).collect();
    let config = RunConfig::read("fuzz", DEFAULT, &sets).unwrap();
    let (run, _) = train(&config, &TrainOptions::default(), &Solo).unwrap();
    let checkpoint = run.join("step-00000001");
    (run, checkpoint)
}

/// A manifest whose own hash fits, where it has one.
fn sealed(bytes: Vec<u8>) -> Vec<u8> {
    let Ok(mut manifest) = serde_json::from_slice::<Value>(&bytes) else { return bytes };
    let Some(object) = manifest.as_object_mut().filter(|object| object.contains_key("sha256"))
    else {
        return bytes;
    };
    let text = |object: &serde_json::Map<String, Value>| {
        serde_json::to_string_pretty(object).unwrap() + "\n"
    };
    object.insert("sha256".into(), "".into());
    let hash = hex(&Sha256::digest(text(object)));
    object.insert("sha256".into(), hash.into());
    text(object).into_bytes()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Samples of a run; with one step of a model this small they take milliseconds.
fn sample_of(run: &Path, conditions: &Path) -> Result<(), Error> {
    let (run, conditions) = (Some(run.into()), Some(conditions.into()));
    sample(&SampleRequest { run, conditions, ..SampleRequest::default() })
}

/// What the digits' model is sampled from.
fn conditions() -> [(&'static str, Tensor); 2] {
    [("noise", ones(&[1, 1, 8, 8])), ("text_embeddings", ones(&[1, 1, 10]))]
}

#[test]
fn a_checkpoint_manifest_is_read_or_refused() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let (run, checkpoint) = run(root.path());
    let (path, given) = (checkpoint.join("manifest.json"), root.path().join("given.safetensors"));
    fs::write(&given, file(&conditions(), &[])).unwrap();
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        told(sample_of(&run, &given))
    };
    hunted(&Prey {
        name: "manifest",
        sound: vec![fs::read(&path).unwrap()],
        words: WORDS,
        dress: &sealed,
        read: &read,
    });
}

/// The part's length and hash in a manifest that is sound otherwise: who writes a part can write a
/// manifest.
fn with_part(manifest: &[u8], name: &str, part: &[u8]) -> Vec<u8> {
    let mut manifest: Value = serde_json::from_slice(manifest).unwrap();
    for entry in
        manifest["parts"].as_array_mut().unwrap().iter_mut().filter(|entry| entry["file"] == name)
    {
        entry["bytes"] = part.len().into();
        entry["sha256"] = hex(&Sha256::digest(part)).into();
    }
    sealed(manifest.to_string().into_bytes())
}

#[test]
fn a_checkpoint_part_is_read_or_refused() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let (run, checkpoint) = run(root.path());
    let (name, given) = ("model-00001-of-00001.safetensors", root.path().join("given.safetensors"));
    fs::write(&given, file(&conditions(), &[])).unwrap();
    let manifest = fs::read(checkpoint.join("manifest.json")).unwrap();
    let read = |bytes: &[u8]| {
        fs::write(checkpoint.join(name), bytes).unwrap();
        fs::write(checkpoint.join("manifest.json"), with_part(&manifest, name, bytes)).unwrap();
        told(sample_of(&run, &given))
    };
    hunted(&Prey {
        name: "part",
        sound: vec![fs::read(checkpoint.join(name)).unwrap()],
        words: WORDS,
        dress: &fitted,
        read: &read,
    });
}

// What one sample or one step is computed from.

#[test]
fn conditions_are_read_or_refused() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let (run, _) = run(root.path());
    let path = root.path().join("conditions.safetensors");
    let [noise, text] = conditions();
    let negative = ("negative.text_embeddings", ones(&[1, 2, 10]));
    let sound = vec![
        file(&conditions(), &[]),
        file(&[noise, text, negative], &[("data_type", "image"), ("task_type", "t2v")]),
    ];
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        told(sample_of(&run, &path))
    };
    hunted(&Prey { name: "conditions", sound, words: WORDS, dress: &fitted, read: &read });
}

#[test]
fn prompts_are_read_or_refused() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let at = |ending: &str| root.path().join(format!("prompts.{ending}"));
    let sound = vec![
        "a cat\n\n a dog, \u{e9}\n".as_bytes().to_vec(),
        br#"{"prompt": "a cat", "negative": "", "seed": 7, "size": "64x32x5"}"#.to_vec(),
    ];
    let words: &[&[u8]] =
        &[b"prompt", b"negative", b"seed", b"size", b"64x64", b"null", b"{}", b"-1"];
    let read = |bytes: &[u8]| {
        let path = at(if bytes.starts_with(b"{") { "jsonl" } else { "txt" });
        fs::write(&path, bytes).unwrap();
        told(read_prompts(&path))
    };
    hunted(&Prey { name: "prompts", sound, words, dress: &as_it_is, read: &read });
}

#[test]
fn a_batch_is_read_or_refused() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let (path, dump) =
        (root.path().join("batch.safetensors"), root.path().join("dump.safetensors"));
    let config = RunConfig::read("fuzz", DEFAULT, &SMALL.map(String::from)).unwrap();
    let tensors = [("image_latents", ones(&[2, 1, 8, 8])), ("text_embeddings", ones(&[2, 1, 10]))];
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        told(dump_step(
            &config,
            &StepRequest {
                batch: path.clone(),
                dump: dump.clone(),
                weights: None,
                torch_seed: None,
                grads: false,
                operators: false,
            },
        ))
    };
    hunted(&Prey {
        name: "batch",
        sound: vec![file(&tensors, &[("data_type", "image")])],
        words: WORDS,
        dress: &fitted,
        read: &read,
    });
}

// The hunt itself.

#[test]
fn a_reader_that_breaks_is_found_out() {
    let _turn = turn();
    let bracketed = |bytes: &[u8]| bytes.contains(&b'[');
    type Breaks<'r> = (&'static str, &'static str, &'r dyn Fn(&[u8]) -> Result<(), String>);
    let breaks: [Breaks<'_>; 5] = [
        ("panics", "it panics: a bracket", &|bytes| {
            if bracketed(bytes) { panic!("a bracket") } else { Ok(()) }
        }),
        ("takes-memory", "bytes of memory", &|bytes| {
            drop(black_box(vec![1u8; if bracketed(bytes) { 65 << 20 } else { 1 }]));
            Ok(())
        }),
        ("takes-time", "of processor time", &|bytes| {
            let began = Instant::now();
            while bracketed(bytes) && began.elapsed() < Duration::from_secs(3) {}
            Ok(())
        }),
        ("breaks-the-line", "its message holds '\\n'", &|bytes| {
            if bracketed(bytes) { Err("a\nb".into()) } else { Ok(()) }
        }),
        ("refuses-what-is-sound", "a sound input is refused", &|_| Err("not this".into())),
    ];
    for (name, what, read) in breaks {
        let prey =
            Prey { name, sound: vec![b"sound".to_vec()], words: WORDS, dress: &as_it_is, read };
        let find = || hunt(&prey, 3, Duration::from_secs(60)).expect_err("it breaks");
        let (finding, again) = (find(), find());
        assert!(finding.what.contains(what), "{finding:?}");
        assert_eq!(
            (finding.input.clone(), finding.seed),
            (again.input, 3),
            "the same seed finds the same"
        );
        fs::remove_file(finding.input).unwrap();
    }
}
