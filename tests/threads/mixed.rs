//! Several datasets in one run, groups that are too small, and micro-batches by tokens: what the
//! settings say is what is trained on, at any number of ranks and through a resume.

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::config::RunConfig;
use fm_dist::error::Error;
use fm_dist::plan::{CheckRequest, check, verify_data};
use fm_dist::run::Resume;
use fm_dist::telemetry::metrics;
use tempfile::TempDir;

use super::training::{FLUX, HUNYUAN_VIDEO15, Tiny, WAN};
use crate::runs::{checkpoint, column, train_in_threads};

/// Sums of f32 numbers in another order, relative.
const ROUNDING: f64 = 2e-5;

/// Pictures for a model of videos.
const PICTURES: Tiny = Tiny {
    data_type: "image",
    keys: &[("image_latents", &[4, 4, 6]), ("text_embeddings", &[5, 12])],
    ..WAN
};

/// Eight pictures and eight videos for a model of videos.
struct Mixed {
    root: TempDir,
    family: Tiny,
}

impl Mixed {
    fn new(pictures: &Tiny, family: Tiny) -> Self {
        let root = TempDir::new().unwrap();
        pictures.write_data(&root.path().join("pictures"));
        family.write_data(&root.path().join("videos"));
        Mixed { root, family }
    }

    fn wan() -> Self {
        Mixed::new(&PICTURES, WAN)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Both datasets, each with further settings.
    fn config(&self, output: &str, [pictures, videos]: [&str; 2], overrides: &[&str]) -> RunConfig {
        let data = format!(
            "[[data.datasets]]\npath = {:?}\n{pictures}\n[[data.datasets]]\npath = {:?}\n{videos}\n",
            self.path("pictures"),
            self.path("videos")
        );
        self.family.config_on(&data, &self.path(output), overrides)
    }

    fn train(&self, config: &RunConfig, ranks: usize) -> PathBuf {
        train_in_threads(config, &Resume::Never, ranks).unwrap()
    }
}

fn plan(config: &RunConfig, world_size: usize) -> Result<String, Error> {
    let request = CheckRequest { world_size, latents: None, text_tokens: 0, scaling: None };
    check(config, &request)
}

/// The type of data of each step.
fn types(run: &Path) -> Vec<String> {
    let lines = metrics::read(&run.join("metrics.jsonl")).unwrap();
    let word = |line: &serde_json::Map<String, serde_json::Value>| {
        line["data_type"].as_str().unwrap().to_string()
    };
    lines.iter().map(word).collect()
}

fn assert_alike(name: &str, one: &Path, other: &Path) {
    for number in ["loss", "unweighted_loss", "grad_norm"] {
        for ((step, one), (_, other)) in column(one, number).iter().zip(column(other, number)) {
            assert!(
                (one - other).abs() <= ROUNDING * one.abs(),
                "{name}: {number} at step {step}: {one} and {other}"
            );
        }
    }
}

/// A global batch of four, in two blocks.
const FOUR: [&str; 3] =
    ["train.global_batch_size=4", "data.micro_batch_size_per_gpu=2", "checkpoint.every_n_steps=6"];
/// Pictures are a third of an epoch.
const THIRD: [&str; 2] = ["weight = 1", "weight = 2"];

#[test]
fn pictures_and_videos_mix_by_weight_with_the_same_samples_on_any_number_of_ranks() {
    let mixed = Mixed::wan();
    let settings = [&FOUR[..], &["max_steps=12", "parallel.deterministic=true"]].concat();
    let run = |name: &str, ranks| mixed.train(&mixed.config(name, THIRD, &settings), ranks);
    let alone = run("alone", 1);
    // An epoch has 8 pictures in two steps, and each of 8 videos twice in four.
    for epoch in types(&alone).chunks(6) {
        assert_eq!(epoch.iter().filter(|word| *word == "image").count(), 2, "{epoch:?}");
    }
    let two = run("two", 2);
    assert!(checkpoint(&alone, 12) == checkpoint(&two, 12), "the ranks are not told by the bits");
    assert_eq!(types(&alone), types(&two));
}

#[test]
fn a_resume_in_the_middle_of_a_mixed_run_is_the_unbroken_run() {
    let mixed = Mixed::wan();
    let datasets = ["repeats = 3", "repeats = 1"];
    let settings = [&FOUR[..], &["max_steps=12"]].concat();
    let config = |name: &str| mixed.config(name, datasets, &settings);
    let unbroken = mixed.train(&config("unbroken"), 2);
    let broken = mixed.train(&config("broken"), 2);
    fs::remove_dir_all(broken.join("step-00000012")).unwrap();
    train_in_threads(&config("broken"), &Resume::Latest, 2).unwrap();
    assert!(checkpoint(&unbroken, 12) == checkpoint(&broken, 12));

    fs::remove_dir_all(broken.join("step-00000012")).unwrap();
    let other = mixed.config("broken", ["repeats = 2", "repeats = 1"], &settings);
    let error = train_in_threads(&other, &Resume::Latest, 2).expect_err("another order");
    assert!(error.to_string().contains("data fingerprint is "), "{error}");
}

#[test]
fn a_resume_where_micro_batches_differ_is_the_unbroken_run() {
    let mixed = Mixed::wan();
    let settings = [
        "data.micro_batch_tokens_per_gpu=46",
        "train.global_batch_size=8",
        "checkpoint.every_n_steps=3",
        "max_steps=6",
        "data.prefetch=3",
    ];
    let config = |name: &str| mixed.config(name, ["repeats = 2", "repeats = 3"], &settings);
    let unbroken = mixed.train(&config("unbroken"), 2);
    let broken = mixed.train(&config("broken"), 2);
    fs::remove_dir_all(broken.join("step-00000006")).unwrap();
    train_in_threads(&config("broken"), &Resume::Latest, 2).unwrap();
    assert!(checkpoint(&unbroken, 6) == checkpoint(&broken, 6));
}

#[test]
fn one_listed_dataset_is_the_one_that_is_named() {
    let mixed = Mixed::wan();
    let settings = [
        "train.global_batch_size=4",
        "data.micro_batch_size_per_gpu=2",
        "max_steps=6",
        "checkpoint.every_n_steps=3",
    ];
    let videos = mixed.path("videos");
    let by_path = |output: &str| {
        mixed.family.config_on(&format!("path = {videos:?}"), &mixed.path(output), &settings)
    };
    let by_list = |output: &str| {
        let entry = format!("[[data.datasets]]\npath = {videos:?}\nweight = 3\n");
        mixed.family.config_on(&entry, &mixed.path(output), &settings)
    };
    let (named, listed) = (mixed.train(&by_path("named"), 1), mixed.train(&by_list("listed"), 1));
    let whole = checkpoint(&named, 6);
    assert!(checkpoint(&listed, 6) == whole);
    // A run goes on under either name.
    fs::remove_dir_all(named.join("step-00000006")).unwrap();
    train_in_threads(&by_list("named"), &Resume::Latest, 1).unwrap();
    assert!(checkpoint(&named, 6) == whole);
}

/// The largest divisors of a rank's samples that fit: pictures have 6 + 5 tokens, videos 18 + 5.
#[test]
fn micro_batches_by_tokens_have_the_loss_and_gradient_of_fixed_ones() {
    let mixed = Mixed::wan();
    let eight = ["train.global_batch_size=8", "max_steps=4"];
    let run = |name: &str, ranks, settings: &[&str]| {
        let settings = [&eight[..], settings].concat();
        mixed.train(&mixed.config(name, ["repeats = 1", "repeats = 1"], &settings), ranks)
    };
    let fixed = run("fixed", 1, &["data.micro_batch_size_per_gpu=1"]);
    let kinds = types(&fixed);
    assert!(kinds.contains(&"image".into()) && kinds.contains(&"video".into()), "{kinds:?}");
    for (name, ranks, settings) in [
        ("one", 1, &["data.micro_batch_tokens_per_gpu=46"][..]),
        ("large", 1, &["data.micro_batch_tokens_per_gpu=100000"]),
        ("small", 2, &["data.micro_batch_tokens_per_gpu=1"]),
        ("two", 2, &["data.micro_batch_tokens_per_gpu=46"]),
        (
            "sharded",
            2,
            &[
                "data.micro_batch_tokens_per_gpu=46",
                "parallel.sharding=parameters",
                "parallel.recompute=always",
            ],
        ),
        ("scattered", 4, &["data.micro_batch_tokens_per_gpu=46", "parallel.sharding=gradients"]),
        ("strata", 2, &["data.micro_batch_tokens_per_gpu=46", "parallel.sharding=optimizer"]),
    ] {
        assert_alike(name, &fixed, &run(name, ranks, settings));
    }
    let strata = "flow_matching.stratified_timesteps=true";
    let fixed = run("strata-fixed", 1, &["data.micro_batch_size_per_gpu=1", strata]);
    let cut = run("strata-cut", 2, &["data.micro_batch_tokens_per_gpu=46", strata]);
    assert_alike("stratified", &fixed, &cut);
}

#[test]
fn check_tells_shares_and_micro_batches_of_each_group() {
    let mixed = Mixed::wan();
    let settings = ["train.global_batch_size=8", "data.micro_batch_tokens_per_gpu=46"];
    let text = plan(&mixed.config("unused", THIRD, &settings), 1).unwrap();
    for line in [
        "8 samples, 8 of an epoch's 24 (33.3 %)",
        "8 samples, 16 of an epoch's 24 (66.7 %)",
        "8 samples over 1 ranks, micro-batches of up to 46 tokens:",
        "2 micro-batches of 4 samples of 4 x 1 x 4 x 6: 6 image tokens, 5 text tokens",
        "4 micro-batches of 2 samples of 4 x 3 x 4 x 6: 18 image tokens, 5 text tokens",
        "3 steps, 0 samples left out of each",
        "random + random: 16 samples; resolution groups: 2",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let settings = ["train.global_batch_size=8", "data.micro_batch_tokens_per_gpu=20"];
    let text = plan(&mixed.config("unused", THIRD, &settings), 2).unwrap();
    let warning = "a sample of resolution group one of ";
    assert!(text.contains(warning) && text.contains("has 23 tokens, more than"), "{text}");
    let error =
        plan(&mixed.config("unused", THIRD, &settings), 3).expect_err("8 samples").to_string();
    assert!(error.contains("8 is no multiple of 3 ranks; nearest: 6 or 9"), "{error}");
}

#[test]
fn a_group_that_is_too_small_stops_is_left_out_or_is_repeated() {
    let mixed = Mixed::wan();
    let settings = |word: &'static str| {
        ["train.global_batch_size=16", "data.micro_batch_size_per_gpu=4", "max_steps=4", word]
    };
    let config = |name: &str, word| mixed.config(name, ["repeats = 2", ""], &settings(word));
    let error = plan(&config("unused", "data.on_small_group=stop"), 1).expect_err("8 videos");
    assert_eq!(error.exit_code(), 40);
    let text = error.to_string();
    assert!(text.contains("has 8 samples, fewer than the global batch of 16"), "{text}");

    let dropped = config("dropped", "data.on_small_group=drop");
    let text = plan(&dropped, 1).unwrap();
    assert!(text.contains("leaves out 1 of 2 resolution groups, of 8 samples"), "{text}");
    assert!(
        text.contains("4 samples of 4 x 1 x 4 x 6:"),
        "of the group that is trained on: {text}"
    );
    assert!(types(&mixed.train(&dropped, 2)).iter().all(|word| word == "image"));

    let repeated = config("repeated", "data.on_small_group=repeat");
    let text = plan(&repeated, 1).unwrap();
    assert!(text.contains("repeats the samples of 1 of 2 resolution groups"), "{text}");
    let run = mixed.train(&repeated, 2);
    for epoch in types(&run).chunks(2) {
        assert_ne!(epoch[0], epoch[1], "a step of each an epoch");
    }
    // Copies of a sample in one global batch lie on both ranks, and have one rank's draws.
    assert_alike("copies", &run, &mixed.train(&config("alone", "data.on_small_group=repeat"), 1));
}

#[test]
fn hunyuan_trains_on_pictures_and_videos() {
    let pictures = Tiny {
        data_type: "image",
        keys: &[
            ("image_latents", &[4, 4, 6]),
            ("text_embeddings", &[5, 12]),
            ("text_mask", &[5]),
            ("text_embeddings_2", &[3, 10]),
            ("text_mask_2", &[3]),
            ("image_embeds", &[7, 8]),
            ("loss_mask", &[4, 4, 6]),
        ],
        ..HUNYUAN_VIDEO15
    };
    let mixed = Mixed::new(&pictures, HUNYUAN_VIDEO15);
    let tasks = ["max_steps=8", "flow_matching.i2v_prob=1.0"];
    let run = mixed.train(&mixed.config("run", ["", ""], &[&FOUR[..], &tasks].concat()), 2);
    let tasks: Vec<String> = metrics::read(&run.join("metrics.jsonl"))
        .unwrap()
        .iter()
        .map(|line| line["task_type"].as_str().unwrap().to_string())
        .collect();
    for (data_type, task) in types(&run).iter().zip(&tasks) {
        // The only frame of a picture is never given; samples of videos draw each for itself.
        assert_eq!(task, if data_type == "image" { "t2v" } else { "mixed" });
    }
}

#[test]
fn a_model_of_pictures_mixes_datasets_into_its_groups() {
    let mixed = Mixed::new(&FLUX, FLUX);
    let settings = [&FOUR[..], &["max_steps=4"]].concat();
    let config = mixed.config("run", ["repeats = 2", "repeats = 1"], &settings);
    let text = plan(&config, 2).unwrap();
    assert!(text.contains("16 samples; resolution groups: 1"), "{text}");
    assert!(text.contains("6 steps, 0 samples left out of each"), "{text}");
    mixed.train(&config, 2);
}

#[test]
fn all_datasets_are_verified_and_what_is_wrong_names_its_file() {
    let mixed = Mixed::wan();
    let config = mixed.config("unused", ["", ""], &FOUR);
    verify_data(&config).unwrap();
    let path = mixed.path("videos").join("samples.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = verify_data(&config).expect_err("a flipped bit").to_string();
    assert!(error.contains("videos/samples.safetensors: has sha256 "), "{error}");
}
