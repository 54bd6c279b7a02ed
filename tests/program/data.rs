//! Datasets are made, described and joined without a line of Python; work that was killed goes on
//! where it stopped.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use fm_dist::data::{Caption, Dataset};
use fm_dist::files::safetensors;
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

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, FLOAT)
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
    for index in 0..3 {
        let tensors =
            [("image_latents", random(&[1, 4, 4])), ("text_embeddings", random(&[index + 2, 8]))];
        save(&folder.join(format!("more/{index}.safetensors")), &tensors);
    }
    let lengths = Tensor::from_slice(&[1i64, 4]);
    let tensors = [
        ("image_latents", random(&[2, 1, 4, 4])),
        ("text_embeddings", random(&[5, 8])),
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
    assert!(again.contains("dataset.json: exists already; delete it"), "{again}");

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
    save(&folder.join("empty.safetensors"), &[("text_embeddings", random(&[2, 8]))]);
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
    for (id, Caption { caption, source }) in (0..).zip(captions) {
        let number = dataset.sample(id).unwrap()["image_latents"].double_value(&[0, 0, 0]);
        assert_eq!((caption, source), (number.to_string(), format!("{number}.png")));
    }
}

#[test]
fn what_looks_wrong_with_a_dataset_is_shown() {
    let root = TempDir::new().unwrap();
    let latents = random(&[6, 3, 4, 4]) * 7;
    latents.get(1).copy_(&latents.get(0));
    let _ = latents.get(2).get(0).get(0).narrow(0, 0, 1).fill_(f64::NAN);
    save(&root.path().join("a.safetensors"), &[("image_latents", latents)]);
    said(&["data", "index", text(root.path())]);
    let picture = root.path().join("latents.png");
    let arguments = ["data", "show", text(root.path()), "--global-batch", "64", "--samples"];
    let (code, _, errors) = finish(program(&[&arguments[..], &[text(&picture)]].concat()));
    assert_eq!(code, 40, "a picture of a sample that is not finite: {errors}");
    let shown = said(&arguments[..arguments.len() - 1]);
    for what in [
        "1 of 6 samples hold numbers that are not finite",
        "1 of 6 samples have the latents of another sample",
        "the latents of group 4x4 have a standard deviation of ",
        "has 6 samples, fewer than the global batch of 64",
    ] {
        assert!(shown.contains(what), "{what}: {shown}");
    }
    said(&["data", "show", "embedded:digits", "--samples", text(&picture)]);
    assert!(fs::read(&picture).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn folders_that_are_no_data_are_refused() {
    let root = TempDir::new().unwrap();
    let folder = text(root.path());
    assert!(refused(40, &["data", "index", folder]).contains("holds no safetensors file"));
    save(&root.path().join("a.safetensors"), &[("latent", random(&[1, 4, 4]))]);
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
    save(&folder.join("a.safetensors"), &[("image_latents", random(&[SAMPLES, 1, 2, 2]))]);
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
