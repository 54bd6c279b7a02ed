//! A validation has one number, whoever computes it and however often the run was broken off; the
//! best checkpoint stays; what is held out is trained on by nobody.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use fm_dist::assembly;
use fm_dist::assembly::validation::ValidationSet;
use fm_dist::collective::Threads;
use fm_dist::commands::{ExportRequest, export};
use fm_dist::config::RunConfig;
use fm_dist::error::Error;
use fm_dist::run::Resume;
use fm_dist::run::checkpoint::SavedWeights;
use fm_dist::telemetry::metrics;
use fm_dist::train::{Ending, TrainOptions, train};
use serde_json::{Map, Value};
use tch::Kind;
use tempfile::TempDir;

use super::sharding::SHARDINGS;
use super::training::{HUNYUAN_VIDEO15, Tiny, WAN};
use crate::runs::{checkpoint, column, tiny, train_in_threads};

/// Some fifty samples in blocks of eight, so that the last one is smaller, after every third step.
const JUDGED: [&str; 5] = [
    "validation.share=0.2",
    "validation.max_samples=53",
    "validation.every_n_steps=3",
    "validation.sigmas=[0.1, 0.5, 0.9]",
    "max_steps=8",
];

fn config(root: &Path, name: &str, overrides: &[&str]) -> RunConfig {
    let output = format!("output_dir={}", root.join(name).display());
    tiny(&[&JUDGED[..], &[output.as_str()], overrides].concat())
}

fn run(root: &Path, name: &str, ranks: usize, overrides: &[&str]) -> PathBuf {
    train_in_threads(&config(root, name, overrides), &Resume::Never, ranks).unwrap()
}

/// The lines of validations, without the time that they took.
pub fn validations(run: &Path) -> Vec<Map<String, Value>> {
    let mut lines = metrics::read(&run.join("metrics.jsonl")).unwrap();
    lines.retain(|line| line.contains_key("validation_loss"));
    lines.iter_mut().for_each(|line| drop(line.remove("validation_seconds")));
    lines
}

fn steps_of(lines: &[Map<String, Value>]) -> Vec<u64> {
    lines.iter().map(|line| line["step"].as_u64().unwrap()).collect()
}

/// The checkpoint to which the link leads.
pub fn best(run: &Path) -> String {
    fs::read_link(run.join("best")).unwrap().display().to_string()
}

const DETERMINISTIC: [&str; 3] =
    ["parallel.deterministic=true", "parallel.seed_scope=sample", "model.dtype=bfloat16"];

#[test]
fn a_validation_has_equal_bits_at_every_number_of_ranks_and_under_every_sharding() {
    let root = TempDir::new().unwrap();
    let alone = run(root.path(), "alone", 1, &DETERMINISTIC);
    let expected = validations(&alone);
    assert_eq!(steps_of(&expected), [0, 3, 6, 8]);
    for line in &expected {
        assert_eq!(line["validation_samples"], 53);
        let losses = line["validation_loss_per_sigma"].as_array().unwrap();
        assert!(losses.iter().all(|loss| loss.as_f64().unwrap() > 0.0), "{line:?}");
        assert!(line["val_loss"].as_f64().unwrap() > 0.0);
    }
    for ranks in [2, 4] {
        for (word, settings) in SHARDINGS {
            let name = format!("{word}-{ranks}");
            let other = run(root.path(), &name, ranks, &[&DETERMINISTIC, settings].concat());
            assert_eq!(validations(&other), expected, "{name}");
            assert_eq!(best(&other), best(&alone), "{name}");
        }
    }
}

#[test]
fn equal_weights_have_equal_bits_also_where_ranks_sum_in_their_own_order() {
    let root = TempDir::new().unwrap();
    let first = |ranks: usize, sharding: &[&str]| {
        let batch = format!("train.global_batch_size={}", 8 * ranks);
        let overrides = [&["max_steps=1", batch.as_str()], sharding].concat();
        let name = format!("{ranks}-{}", sharding.len());
        validations(&run(root.path(), &name, ranks, &overrides)).swap_remove(0)
    };
    let alone = first(1, &[]);
    // Seven blocks for three and for eight ranks: some have none of their own in the last round.
    for ranks in [3, 8] {
        assert_eq!(first(ranks, &[]), alone, "{ranks} ranks");
        assert_eq!(first(ranks, SHARDINGS[3].1), alone, "{ranks} ranks, sharded");
    }
}

#[test]
fn what_a_run_computes_does_not_depend_on_being_judged() {
    let root = TempDir::new().unwrap();
    let judged = run(root.path(), "judged", 2, &["checkpoint.keep_best=false"]);
    let never = run(
        root.path(),
        "never",
        2,
        &["validation.every_n_steps=1000", "checkpoint.keep_best=false"],
    );
    assert_eq!(steps_of(&validations(&never)), [0, 8], "before the first step and after the last");
    assert_eq!(checkpoint(&judged, 8), checkpoint(&never, 8));
    for key in ["loss", "grad_norm"] {
        assert_eq!(column(&judged, key), column(&never, key), "{key}");
    }
}

#[test]
fn nothing_that_is_held_out_is_trained_on_and_other_shares_are_refused() {
    let root = TempDir::new().unwrap();
    let config = config(root.path(), "run", &["checkpoint.every_n_steps=4"]);
    let dataset = std::sync::Arc::new(assembly::dataset(&config).unwrap());
    let set = ValidationSet::of(&config, &dataset).unwrap().unwrap();
    let judged: BTreeSet<u64> = set.blocks.iter().flat_map(|block| block.ids.clone()).collect();
    assert_eq!(judged.len(), 53);
    for ranks in [1, 2, 4] {
        let epoch = assembly::order(&config, &dataset, ranks).unwrap().batches_per_epoch();
        let mut trained = BTreeSet::new();
        Threads::run(ranks, |world| {
            let steps = assembly::steps(&config, &dataset, world).unwrap();
            let places = steps.places_after(0).take_while(|place| place.step <= 2 * epoch);
            places.flat_map(|place| steps.sample_ids(place)).collect::<Vec<u64>>()
        })
        .into_iter()
        .for_each(|ids| trained.extend(ids));
        assert!(trained.len() > 1300, "{} samples", trained.len());
        let held_out: BTreeSet<u64> =
            dataset.groups().iter().flat_map(|group| group.held_out.clone()).collect();
        assert!(trained.is_disjoint(&held_out) && held_out.is_superset(&judged), "{ranks} ranks");
    }
    train_in_threads(&config, &Resume::Never, 1).unwrap();
    fs::remove_dir_all(root.path().join("run/step-00000008")).unwrap();
    for (share, now) in [("validation.share=0.3", "0.3"), ("validation.share=0.1", "0.1")] {
        let other = super::validation::config(root.path(), "run", &[share]);
        let error = train_in_threads(&other, &Resume::Latest, 1).unwrap_err();
        assert_eq!(error.exit_code(), 51, "{error}");
        let expected =
            format!("validation.share is {now}, the checkpoint's was 0.2; data fingerprint");
        assert!(error.to_string().contains(&expected), "{error}");
    }
}

/// Removes the checkpoints behind a step and what else a run that dies there lacks.
fn break_off(run: &Path, after: u64, checkpoints: &[u64]) {
    for step in checkpoints.iter().filter(|step| **step > after) {
        fs::remove_dir_all(run.join(format!("step-{step:08}"))).unwrap();
    }
}

#[test]
fn a_resumed_run_validates_neither_twice_nor_never_at_any_number_of_ranks() {
    let root = TempDir::new().unwrap();
    let settings = [
        &DETERMINISTIC[..],
        &["checkpoint.every_n_steps=3", "checkpoint.keep_last=9", "max_steps=12"],
    ]
    .concat();
    let unbroken = run(root.path(), "unbroken", 1, &settings);
    let expected = validations(&unbroken);
    assert_eq!(steps_of(&expected), [0, 3, 6, 9, 12]);
    let broken = run(root.path(), "broken", 2, &settings);
    // Behind a step that was validated, twice, at other numbers of ranks.
    for (after, ranks, sharding) in [(6, 4, 3), (3, 1, 0)] {
        break_off(&broken, after, &[3, 6, 9, 12]);
        let overrides = [&settings, SHARDINGS[sharding].1].concat();
        train_in_threads(&config(root.path(), "broken", &overrides), &Resume::Latest, ranks)
            .unwrap();
        assert_eq!(validations(&broken), expected, "after step {after}");
        assert_eq!(best(&broken), best(&unbroken));
    }
    assert_eq!(column(&broken, "loss"), column(&unbroken, "loss"));
    // One that its checkpoint lacks is made up for, and stands in the metrics once.
    break_off(&broken, 9, &[12]);
    fs::remove_file(broken.join("step-00000009/validation.json")).unwrap();
    train_in_threads(&config(root.path(), "broken", &settings), &Resume::Latest, 2).unwrap();
    assert_eq!(
        validations(&broken)
            .iter()
            .map(|line| line["step"].as_u64())
            .collect::<BTreeSet<_>>()
            .len(),
        5
    );
    let mut sorted = validations(&broken);
    sorted.sort_by_key(|line| line["step"].as_u64());
    assert_eq!(sorted, expected);
    assert_eq!(checkpoint(&broken, 9), checkpoint(&unbroken, 9));
    // So is one by another criterion.
    fs::remove_dir_all(broken.join("step-00000012")).unwrap();
    let other = [&settings[..], &["validation.sigmas=[0.5]"]].concat();
    train_in_threads(&config(root.path(), "broken", &other), &Resume::Latest, 2).unwrap();
    let lines = validations(&broken);
    assert_eq!(steps_of(&lines).into_iter().filter(|step| *step == 9).count(), 1);
    let of_9 = lines.iter().find(|line| line["step"] == 9).unwrap();
    assert_eq!(of_9["validation_sigmas"], serde_json::json!([0.5]));
}

#[test]
fn a_run_that_is_asked_to_stop_saves_first_and_validates_where_it_goes_on() {
    let root = TempDir::new().unwrap();
    let settings = [&DETERMINISTIC[..], &["validation.every_n_steps=1", "max_steps=3"]].concat();
    let unbroken = run(root.path(), "unbroken", 2, &settings);
    let config = config(root.path(), "stopped", &settings);
    // The time is over before the first step.
    let options = || TrainOptions { stop_at: Some(Instant::now()), ..TrainOptions::default() };
    let ended = Threads::run(2, |world| train(&config, &options(), world).unwrap());
    let (stopped, ending) = ended.into_iter().next().unwrap();
    assert_eq!(ending, Ending::Stopped);
    assert!(validations(&stopped).is_empty(), "no grace is spent on a validation");
    assert!(!stopped.join("step-00000001/validation.json").exists());
    train_in_threads(&config, &Resume::Latest, 2).unwrap();
    assert_eq!(steps_of(&validations(&stopped)), [1, 2, 3], "that before training is gone by");
    assert_eq!(validations(&stopped), validations(&unbroken)[1..]);
    assert_eq!(best(&stopped), best(&unbroken));
    assert_eq!(checkpoint(&stopped, 3), checkpoint(&unbroken, 3));
}

#[test]
fn a_run_that_is_asked_to_stop_in_its_last_step_is_over_once_it_has_validated() {
    let root = TempDir::new().unwrap();
    let config = config(root.path(), "stopped", &["max_steps=1"]);
    let options = || TrainOptions { stop_at: Some(Instant::now()), ..TrainOptions::default() };
    let ended = Threads::run(1, |world| train(&config, &options(), world).unwrap());
    let (stopped, ending) = ended.into_iter().next().unwrap();
    assert_eq!(ending, Ending::Stopped);
    assert!(!stopped.join("report.html").exists());
    // Asked to stop again before the validation is made up for, it is still not over.
    let again = || TrainOptions { resume: Resume::Latest, ..options() };
    let ended = Threads::run(1, |world| train(&config, &again(), world).unwrap().1);
    assert_eq!(ended, [Ending::Stopped]);
    assert!(validations(&stopped).is_empty() && !stopped.join("report.html").exists());
    train_in_threads(&config, &Resume::Latest, 1).unwrap();
    assert_eq!(steps_of(&validations(&stopped)), [1]);
    assert!(stopped.join("step-00000001/validation.json").exists());
    assert!(stopped.join("report.html").exists());
}

#[test]
fn the_best_checkpoint_is_saved_between_others_and_outlives_them() {
    let root = TempDir::new().unwrap();
    // The learning rate rises until the model gets worse.
    let settings = [
        "max_steps=24",
        "checkpoint.every_n_steps=7",
        "checkpoint.keep_last=1",
        "optimizer.adamw.lr=0.3",
        "lr_scheduler.cosine.warmup_steps=24",
        "train.check_loss=false",
        "train.on_loss_spike=ignore",
    ];
    let spoiled = run(root.path(), "spoiled", 2, &settings);
    let losses = column(&spoiled, "validation_loss");
    let trained = losses.iter().filter(|(step, _)| *step > 0.0);
    let (lowest, _) = trained.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!((3.0..21.0).contains(lowest), "the model gets better, then worse: {losses:?}");
    let name = format!("step-{:08}", *lowest as u64);
    assert_eq!(best(&spoiled), name);
    let saved = |run: &Path| -> BTreeSet<String> {
        let entries = fs::read_dir(run).unwrap().map(|entry| entry.unwrap().file_name());
        let names = entries.map(|name| name.into_string().unwrap());
        names.filter(|name| name.starts_with("step-")).collect()
    };
    assert_eq!(saved(&spoiled), BTreeSet::from([name.clone(), "step-00000024".into()]));
    let judged = fs::read_to_string(spoiled.join("best/validation.json")).unwrap();
    let judged: Value = serde_json::from_str(&judged).unwrap();
    assert_eq!(judged["step"].as_f64(), Some(*lowest));
    // The checkpoint is one like any other.
    assert_eq!(checkpoint(&spoiled, *lowest as u64).len(), 4);
    let careless = [&settings[..], &["checkpoint.keep_best=false"]].concat();
    let careless = run(root.path(), "careless", 2, &careless);
    assert!(!careless.join("best").exists());
    assert_eq!(saved(&careless), BTreeSet::from(["step-00000024".to_string()]));
    assert_eq!(column(&careless, "validation_loss"), losses);
    // Without the setting a resume lets the best one go, and the link with it.
    let on = config(
        root.path(),
        "spoiled",
        &[&settings[..], &["max_steps=26", "checkpoint.keep_best=false"]].concat(),
    );
    train_in_threads(&on, &Resume::Latest, 2).unwrap();
    assert_eq!(saved(&spoiled), BTreeSet::from(["step-00000026".to_string()]));
    assert!(fs::symlink_metadata(spoiled.join("best")).is_err(), "no link into nothing");
}

const LORA: [&str; 4] =
    ["lora.rank=4", "lora.alpha=8", "lora.dropout=0.5", "lora.target_modules=['all-linear']"];

#[test]
fn a_lora_is_judged_as_it_is_merged_without_dropout() {
    let root = TempDir::new().unwrap();
    let (data, other) = two_datasets(&WAN, root.path());
    let path = format!("validation.path={}", other.display());
    let of = |name: &str, overrides: &[&str]| -> Result<PathBuf, Error> {
        let judged = [path.as_str(), "validation.every_n_steps=4", "checkpoint.keep_best=false"];
        let config = WAN.config(&data, &root.path().join(name), &[&judged, overrides].concat());
        train_in_threads(&config, &Resume::Never, 2)
    };
    let base = of("base", &["max_steps=2"]).unwrap();
    let folder = |run: &Path, name: &str, merge: bool| {
        let out = root.path().join(name);
        let request = ExportRequest {
            run: run.into(),
            out: out.clone(),
            max_shard_bytes: 1 << 30,
            dtype: None,
            merge,
            format: None,
            weights: SavedWeights::Trained,
        };
        export(&request).unwrap();
        format!("model.path={}", out.display())
    };
    let path = folder(&base, "exported", false);
    let tuned = of("tuned", &[&LORA[..], &["max_steps=8", path.as_str()]].concat()).unwrap();
    let (of_base, of_tuned) = (validations(&base), validations(&tuned));
    let loss = |line: &Map<String, Value>| line["validation_loss"].as_f64().unwrap();
    // B is zero at the start.
    assert_eq!(
        of_tuned[0]["validation_loss_per_sigma"],
        of_base.last().unwrap()["validation_loss_per_sigma"]
    );
    let merged = folder(&tuned, "merged", true);
    let again = of("again", &["max_steps=1", merged.as_str()]).unwrap();
    let (merged, expected) = (loss(&validations(&again)[0]), loss(of_tuned.last().unwrap()));
    assert!((merged - expected).abs() < 2e-5 * expected, "{merged} and {expected}");
    assert!((loss(&of_tuned[0]) - expected).abs() > 1e-3 * expected, "the LoRA does something");
}

/// Writes a family's data to train on and others to judge by, and returns both folders.
fn two_datasets(family: &Tiny, root: &Path) -> (PathBuf, PathBuf) {
    let (data, other) = (root.join("data"), root.join("other"));
    if !data.exists() {
        family.write_data(&data);
        let mut samples = family.samples();
        let floats = samples.values_mut().filter(|tensor| tensor.kind() == Kind::Float);
        floats.for_each(|tensor| *tensor = &*tensor * 0.5);
        family.write(&other, &samples);
    }
    (data, other)
}

/// The validations of a family's run on data of their own.
fn judged_on_others(
    family: &Tiny,
    root: &Path,
    ranks: usize,
    overrides: &[&str],
) -> Vec<Map<String, Value>> {
    let (data, other) = two_datasets(family, root);
    let path = format!("validation.path={}", other.display());
    let settings = [
        "max_steps=4",
        "validation.every_n_steps=2",
        "validation.quantiles=[0.25, 0.75]",
        path.as_str(),
    ];
    let name = format!("{ranks}-{}", overrides.len());
    let config = family.config(&data, &root.join(name), &[&settings[..], overrides].concat());
    validations(&train_in_threads(&config, &Resume::Never, ranks).unwrap())
}

#[test]
fn videos_with_tasks_and_masks_are_judged_alike_on_any_ranks() {
    for family in [WAN, HUNYUAN_VIDEO15] {
        let root = TempDir::new().unwrap();
        let settings = [
            "parallel.deterministic=true",
            "flow_matching.i2v_prob=0.5",
            "flow_matching.cfg_dropout_prob=0.5",
            "train.global_batch_size=8",
        ];
        let alone = judged_on_others(&family, root.path(), 1, &settings);
        assert_eq!(steps_of(&alone), [0, 2, 4], "{}", family.adapter);
        assert!(alone[0].contains_key("validation_loss_per_quantile"));
        let sharded = [&settings[..], SHARDINGS[3].1].concat();
        assert_eq!(
            judged_on_others(&family, root.path(), 4, &sharded),
            alone,
            "{}",
            family.adapter
        );
    }
}
