//! Datasets are made, described and joined without a line of Python; work that was killed goes on
//! where it stopped.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use fm_dist::data::{Caption, Dataset};
use fm_dist::files::safetensors;
use fm_dist::rng::{Key, Purpose};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::cli::only_error;
use crate::runs::{finish, program};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn save(path: &Path, tensors: &[(&str, Tensor)]) {
    let borrowed: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(key, tensor)| (*key, tensor)).collect();
    safetensors::write(&mut fs::File::create(path).unwrap(), &borrowed, &BTreeMap::new()).unwrap();
}

/// Standard output of a command that succeeds.
fn said(arguments: &[&str]) -> String {
    let (code, output, errors) = finish(program(arguments));
    assert_eq!(code, 0, "{arguments:?}: {errors}");
    output
}

/// The one line with which a command is refused.
fn refused(code: i32, arguments: &[&str]) -> String {
    let (found, _, errors) = finish(program(arguments));
    assert_eq!(found, code, "{arguments:?}: {errors}");
    only_error(&errors).to_string()
}

/// Normal numbers; those of another scope are others.
fn random(scope: u64, shape: &[i64]) -> Tensor {
    Key::new(1, Purpose::Test).scope(scope).seeded(|| Tensor::randn(shape, FLOAT))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Samples by their order: latents and texts as bytes.
fn samples(folder: &Path) -> Vec<Vec<u8>> {
    let dataset = Dataset::open(folder).unwrap();
    dataset.verify_hashes().unwrap();
    let bytes = |id| {
        let tensors = dataset.sample(id).unwrap();
        tensors.values().flat_map(|tensor| fm_dist::tensor::bytes(tensor).to_vec()).collect()
    };
    (0..dataset.num_samples()).map(bytes).collect()
}

/// A folder of stacked files and of files with one sample each, whose texts differ in length.
fn mixed(root: &Path) -> std::path::PathBuf {
    let folder = root.join("mixed");
    fs::create_dir_all(folder.join("more")).unwrap();
    for (index, tokens) in (0..3).zip([2, 3, 4]) {
        let tensors = [
            ("image_latents", random(index, &[1, 4, 4])),
            ("text_embeddings", random(10 + index, &[tokens, 8])),
        ];
        save(&folder.join(format!("more/{index}.safetensors")), &tensors);
    }
    let lengths = Tensor::from_slice(&[1i64, 4]);
    let tensors = [
        ("image_latents", random(3, &[2, 1, 4, 4])),
        ("text_embeddings", random(13, &[5, 8])),
        ("text_embeddings.lengths", lengths),
    ];
    save(&folder.join("stacked.safetensors"), &tensors);
    folder
}

#[test]
fn a_folder_of_files_becomes_a_dataset_that_is_described_and_packed() {
    let root = TempDir::new().unwrap();
    let folder = mixed(root.path());
    let line = said(&["data", "index", text(&folder), "--licence", "CC0"]);
    assert!(line.ends_with("mixed: 5 samples in 4 files, resolution groups: 1\n"), "{line}");
    let again = refused(40, &["data", "index", text(&folder)]);
    assert!(again.contains("dataset.json: exists already; move it away"), "{again}");

    let shown: Value = serde_json::from_str(&said(&[
        "data",
        "show",
        text(&folder),
        "--json",
        "--global-batch",
        "2",
    ]))
    .unwrap();
    assert_eq!((&shown["samples"], &shown["steps_per_epoch"]), (&5.into(), &2.into()));
    assert_eq!((&shown["licence"], &shown["name"]), (&"CC0".into(), &"mixed".into()));
    let texts = &shown["groups"][0]["tensors"]["text_embeddings"];
    assert_eq!(texts["lengths"], serde_json::json!([1, 4]));
    assert_eq!(shown["warnings"], serde_json::json!([]));

    let packed = root.path().join("packed");
    let line = said(&["data", "pack", text(&folder), "--out", text(&packed)]);
    assert!(line.ends_with("packed: 5 samples in 1 files, resolution groups: 1\n"), "{line}");
    assert_eq!(samples(&packed), samples(&folder));
    let exists = refused(40, &["data", "pack", text(&folder), "--out", text(&packed)]);
    assert!(exists.contains("exists already"), "{exists}");

    let shuffled = root.path().join("shuffled");
    let mut arguments = vec!["data", "pack", text(&folder), "--out", text(&shuffled)];
    arguments.extend(["--shuffle", "3", "--shard-size", "100B", "--jobs", "3"]);
    assert!(said(&arguments).contains(": 5 samples in 5 files"));
    let (mut found, mut expected) = (samples(&shuffled), samples(&folder));
    assert_ne!(found, expected, "another order");
    found.sort();
    expected.sort();
    assert_eq!(found, expected, "the same samples");
}

#[test]
fn packing_keeps_captions_with_their_samples_and_what_else_a_dataset_has() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("digits");
    fs::create_dir(&folder).unwrap();
    for index in 0..4 {
        let latents = Tensor::full([1, 2, 2], index, FLOAT);
        save(&folder.join(format!("{index}.safetensors")), &[("image_latents", latents)]);
    }
    save(&folder.join("empty.safetensors"), &[("text_embeddings", random(0, &[2, 8]))]);
    let lines: String = (0..4)
        .map(|index| format!("{{\"caption\":\"{index}\",\"source\":\"{index}.png\"}}\n"))
        .collect();
    fs::write(folder.join("captions.jsonl"), lines).unwrap();
    said(&["data", "index", text(&folder)]);
    let packed = root.path().join("packed");
    said(&["data", "pack", text(&folder), "--out", text(&packed), "--shuffle", "5"]);
    let dataset = Dataset::open(&packed).unwrap();
    dataset.verify_hashes().unwrap();
    assert_eq!(dataset.empty_prompt_shapes()["text_embeddings"], [2, 8]);
    let mut captions = Vec::new();
    let each = |caption: Caption| {
        captions.push(caption);
        Ok(())
    };
    dataset.captions().unwrap().for_each(each).unwrap();
    for (id, Caption { caption, source, .. }) in (0..).zip(captions) {
        let number = dataset.sample(id).unwrap()["image_latents"].double_value(&[0, 0, 0]);
        assert_eq!((caption, source), (number.to_string(), format!("{number}.png")));
    }
}

#[test]
fn what_looks_wrong_with_a_dataset_is_shown() {
    let root = TempDir::new().unwrap();
    let latents = random(0, &[6, 3, 4, 4]) * 7;
    latents.get(1).copy_(&latents.get(0));
    let _ = latents.get(2).get(0).get(0).narrow(0, 0, 1).fill_(f64::NAN);
    save(&root.path().join("a.safetensors"), &[("image_latents", latents)]);
    said(&["data", "index", text(root.path())]);
    let picture = root.path().join("latents.png");
    let arguments = ["data", "show", text(root.path()), "--global-batch", "64", "--samples"];
    let shown = said(&[&arguments[..], &[text(&picture)]].concat());
    assert!(fs::read(&picture).unwrap().starts_with(b"\x89PNG"), "of the finite samples");
    for what in [
        "1 of 6 samples hold numbers that are not finite",
        "1 of 6 samples have the latents of another sample: sample 1 those of sample 0",
        "the latents of group 4x4 have a standard deviation of ",
        "has 6 samples, fewer than the global batch of 64",
    ] {
        assert!(shown.contains(what), "{what}: {shown}");
    }
    said(&["data", "show", "embedded:digits", "--samples", text(&picture)]);
    assert!(fs::read(&picture).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn kinds_lengths_and_scales_are_shown_and_packed_with_their_bits() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("eight");
    fs::create_dir(&folder).unwrap();
    let mask = Tensor::from_slice(&[1i64, 1, 0, 1, 1, 1]).view([2, 3]);
    let tensors = [
        ("image_latents", random(0, &[2, 4, 4, 4]).to_kind(Kind::BFloat16)),
        ("text_embeddings", random(1, &[2, 3, 8]).to_kind(Kind::Float8e4m3fn)),
        ("text_embeddings.scale", Tensor::from_slice(&[0.5f32, 2.0])),
        ("text_mask", mask),
    ];
    save(&folder.join("a.safetensors"), &tensors);
    said(&["data", "index", text(&folder)]);
    let shown: Value =
        serde_json::from_str(&said(&["data", "show", text(&folder), "--json"])).unwrap();
    let texts = &shown["groups"][0]["tensors"]["text_embeddings"];
    assert_eq!(texts["kind"], "float8_e4m3fn");
    assert_eq!(texts["valid_tokens"], serde_json::json!([2, 3]));
    assert_eq!(texts["scales"], serde_json::json!([0.5, 2.0]));
    // 256 bytes of latents, 48 of texts, 8 of scales, 48 of masks.
    assert_eq!(shown["groups"][0]["bytes"], 360);
    assert_eq!(shown["groups"][0]["tensors"]["image_latents"]["kind"], "bfloat16");
    let packed = root.path().join("packed");
    said(&["data", "pack", text(&folder), "--out", text(&packed), "--shard-size", "1B"]);
    assert_eq!(samples(&packed), samples(&folder));
    let batch = |folder: &Path| Dataset::open(folder).unwrap().batch(&[0, 1]).unwrap();
    let found = &batch(&packed).tensors["text_embeddings"];
    assert_eq!(found.kind(), Kind::Float);
    assert!(found.equal(&batch(&folder).tensors["text_embeddings"]));
}

#[test]
fn a_cache_of_8_bits_keeps_them() {
    let root = TempDir::new().unwrap();
    let (cache, out) = (root.path().join("cache"), root.path().join("out"));
    fs::create_dir(&cache).unwrap();
    let stored = random(0, &[5, 12]).to_kind(Kind::Float8e4m3fn);
    let latents = ("latents_4x6_bfloat16", random(1, &[16, 4, 6]).to_kind(Kind::BFloat16));
    save(&cache.join("cat_0096x0064_f2k4b.safetensors"), &[latents]);
    let texts = ("ctx_vec_float8_e4m3fn", stored.copy());
    save(&cache.join("cat_f2k4b_te.safetensors"), &[texts]);
    let hint = refused(40, &["data", "show", text(&cache)]);
    let command = format!("`fm-dist data import --from musubi {} --out DIR`", cache.display());
    assert!(hint.contains(&command), "{hint}");
    said(&["data", "import", "--from", "musubi", text(&cache), "--out", text(&out)]);
    let dataset = Dataset::open(&out).unwrap();
    let found = &dataset.sample(0).unwrap()["text_embeddings"];
    assert_eq!(found.kind(), Kind::Float8e4m3fn);
    assert_eq!(fm_dist::tensor::bytes(found), fm_dist::tensor::bytes(&stored));
}

/// A snapshot in the layout of Hugging Face's cache: its files are links to blobs that lie outside
/// of it.
fn snapshot(root: &Path) -> std::path::PathBuf {
    let (blobs, folder) = (root.join("blobs"), root.join("snapshots/0a1b"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(folder.join("more")).unwrap();
    for (scope, blob, name) in [(0, "c0", "a.safetensors"), (1, "c1", "more/b.safetensors")] {
        save(&blobs.join(blob), &[("image_latents", random(scope, &[4, 3, 4, 4]))]);
        let up = "../".repeat(name.matches('/').count());
        symlink(format!("{up}../../blobs/{blob}"), folder.join(name)).unwrap();
    }
    folder
}

#[test]
fn a_snapshot_of_hugging_face_is_indexed_shown_packed_and_checked_by_its_links() {
    let root = TempDir::new().unwrap();
    let folder = snapshot(root.path());
    let line = refused(40, &["data", "index", text(&folder)]);
    assert!(
        line.contains("path leaves the data folder") && line.contains("--follow-links"),
        "{line}"
    );
    let line = said(&["data", "index", text(&folder), "--follow-links"]);
    assert!(line.ends_with(": 8 samples in 2 files, resolution groups: 1\n"), "{line}");
    assert!(refused(40, &["data", "show", text(&folder)]).contains("--follow-links"));
    assert!(said(&["data", "show", text(&folder), "--follow-links"]).contains("8 of type image"));
    let packed = root.path().join("packed");
    said(&["data", "pack", text(&folder), "--out", text(&packed), "--follow-links"]);
    assert_eq!(Dataset::open(&packed).unwrap().num_samples(), 8);
    let path = format!("data.path={}", folder.display());
    let check = ["check", "--verify-data", "--set", "model.dit.in_channels=3", "--set", &path];
    let line = refused(40, &check);
    assert!(line.contains("data.follow_links = true"), "{line}");
    let followed = [&check[..], &["--set", "data.follow_links=true"]].concat();
    let (_, _, errors) = finish(program(&followed));
    assert!(!errors.contains("follow_links"), "the data were opened: {errors}");
}

#[test]
fn links_in_a_circle_end() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("a");
    fs::create_dir(&folder).unwrap();
    save(&folder.join("a.safetensors"), &[("image_latents", random(0, &[2, 1, 4, 4]))]);
    symlink("../a", folder.join("again")).unwrap();
    symlink(".", folder.join("here")).unwrap();
    let line = said(&["data", "index", text(&folder), "--follow-links"]);
    assert!(line.contains(": 2 samples in 1 files"), "{line}");
}

#[test]
fn folders_that_are_no_data_are_refused() {
    let root = TempDir::new().unwrap();
    let folder = text(root.path());
    assert!(refused(40, &["data", "index", folder]).contains("holds no safetensors file"));
    save(&root.path().join("a.safetensors"), &[("latent", random(0, &[1, 4, 4]))]);
    let line = refused(40, &["data", "index", folder]);
    assert!(
        line.contains("holds neither `image_latents` nor `video_latents`; it has latent"),
        "{line}"
    );
    for (from, what) in [
        ("nemo", "holds no sample of this cache's format"),
        ("musubi", "a.safetensors: is of architecture"),
        ("diffusion-pipe", "holds no sample of this cache's format"),
        ("simpletuner", "holds no latents `<picture>.pt`"),
        ("ai-toolkit", "holds no sample of this cache's format"),
    ] {
        let out = root.path().join("out");
        let line = refused(40, &["data", "import", "--from", from, folder, "--out", text(&out)]);
        assert!(line.contains(what) && !out.exists(), "{line}");
    }
    let (code, _, errors) =
        finish(program(&["data", "import", "--from", "kohya", folder, "--out", "x"]));
    assert_eq!(code, 2);
    assert!(
        errors.contains("expected one of nemo, musubi, diffusion-pipe, simpletuner, ai-toolkit"),
        "{errors}"
    );
}

#[test]
fn a_dataset_whose_writing_was_killed_is_finished_by_the_same_command() {
    const SAMPLES: i64 = 600;
    let root = TempDir::new().unwrap();
    let folder = root.path().join("source");
    fs::create_dir(&folder).unwrap();
    save(&folder.join("a.safetensors"), &[("image_latents", random(0, &[SAMPLES, 1, 2, 2]))]);
    said(&["data", "index", text(&folder)]);
    let out = root.path().join("out");
    let (begun, log) = (out.join("2x2-00000.safetensors"), out.join("unfinished.jsonl"));
    let arguments =
        ["data", "pack", text(&folder), "--out", text(&out), "--shard-size", "1B", "--jobs", "1"];
    let mut killed = program(&arguments).stdout(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    let lines = || fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    while lines() < 4 {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing is written");
        std::thread::sleep(Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(!out.join("dataset.json").exists(), "it was too fast to be killed");
    let inode = fs::metadata(&begun).unwrap().ino();

    let other = [&arguments[..6], &["1MB"][..]].concat();
    let line = refused(40, &other);
    assert!(line.contains("holds an unfinished dataset of other samples or file sizes"), "{line}");
    said(&arguments);
    assert_eq!(
        fs::metadata(&begun).unwrap().ino(),
        inode,
        "what was finished is not written again"
    );
    assert!(!log.exists());
    assert_eq!(samples(&out), samples(&folder));
    let unbroken = root.path().join("unbroken");
    said(&[&arguments[..4], &[text(&unbroken)], &arguments[5..]].concat());
    let document = |folder: &Path| fs::read(folder.join("dataset.json")).unwrap();
    assert_eq!(document(&out), document(&unbroken));
}
