//! Averages of the weights follow the weights of every update, alike on any ranks, survive a
//! resume, and are what samples and exports take where they are asked for.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::assembly::trained_replica;
use fm_dist::collective::Threads;
use fm_dist::commands::{ExportRequest, export};
use fm_dist::config::RunConfig;
use fm_dist::error::Error;
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::lora::Dialect;
use fm_dist::optim::{EmaSettings, ema};
use fm_dist::parallel::{Devices, Replica, ShardingGroup, Sharing};
use fm_dist::rng::{Key, Purpose};
use fm_dist::run::Resume;
use fm_dist::run::checkpoint::SavedWeights;
use fm_dist::run::optimizer_state::OptimizerState;
use fm_dist::sample::{SampleRequest, sample};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::sharding::SHARDINGS;
use super::training::FLUX;
use crate::runs::{checkpoint, tiny, train_in_threads};

/// An average whose decay rises within a few steps.
const EMA: &[&str] = &["ema.decay=0.9"];

/// Settings under which every number of ranks sums alike.
const DETERMINISTIC: &[&str] =
    &["parallel.deterministic=true", "parallel.seed_scope=sample", "train.global_batch_size=64"];

fn config(root: &Path, name: &str, overrides: &[&str]) -> RunConfig {
    let output = format!("output_dir={}", root.join(name).display());
    let steps = ["max_steps=8", "checkpoint.every_n_steps=4", "checkpoint.keep_last=99"];
    tiny(&[EMA, &steps[..], &[output.as_str()], overrides].concat())
}

fn run(root: &Path, name: &str, ranks: usize, overrides: &[&str]) -> PathBuf {
    train_in_threads(&config(root, name, overrides), &Resume::Never, ranks).unwrap()
}

/// The tensors of one kind of a checkpoint's files by name.
pub fn saved(run: &Path, step: u64, word: &str) -> BTreeMap<String, Tensor> {
    let path = format!("step-{step:08}/{word}-00001-of-00001.safetensors");
    let file = SafeTensors::open(run.join(path)).unwrap();
    let read = |name: &String| (name.clone(), file.read(name).unwrap());
    let names: Vec<String> = file.tensors().iter().map(|info| info.name.clone()).collect();
    names.iter().map(read).collect()
}

/// Checks the averages of each step against the weights of each step, of a run that saved them all;
/// `skipped`: the step that updated nothing.
pub fn check_each_step(run: &Path, settings: &EmaSettings, steps: u64, skipped: Option<u64>) {
    let mut averages = saved(run, 1, "ema");
    for step in 2..=steps {
        let number = step - u64::from(skipped.is_some_and(|skipped| skipped <= step));
        let share = settings.share_after(number).filter(|_| skipped != Some(step));
        let weights = saved(run, step, "model");
        let found = saved(run, step, "ema");
        assert_eq!(found.keys().collect::<Vec<_>>(), weights.keys().collect::<Vec<_>>());
        for (name, average) in &mut averages {
            *average = average.to_kind(settings.dtype.kind());
            if let Some(share) = share {
                ema::advance(average, &weights[name], share);
            }
            assert!(found[name].equal(&average.to_kind(Kind::Float)), "step {step}: {name}");
        }
    }
}

#[test]
fn averages_move_by_diffusers_rule_from_the_weights_of_each_step() {
    let root = TempDir::new().unwrap();
    let each = ["checkpoint.every_n_steps=1"];
    let cases: [(&str, &[&str]); 5] = [
        ("float32", &[]),
        ("bfloat16", &["model.dtype=bfloat16", "parallel.sharding=optimizer"]),
        ("narrow", &["ema.dtype=bfloat16", "ema.use_ema_warmup=true", "ema.power=0.75"]),
        ("rare", &["ema.every_n_steps=3", "ema.min_decay=0.3"]),
        ("late", &["ema.update_after_step=3", "optimizer.lr_factors={'blocks.0'=0.5}"]),
    ];
    for (name, overrides) in cases {
        let overrides = [&each, overrides].concat();
        let config = config(root.path(), name, &overrides);
        let run = train_in_threads(&config, &Resume::Never, 2).unwrap();
        check_each_step(&run, &config.ema, 8, None);
        let differ = saved(&run, 8, "model") != saved(&run, 8, "ema");
        assert!(differ, "{name}: the average is not the weights");
    }
}

#[test]
fn averages_are_bit_equal_at_every_world_size_and_under_every_sharding() {
    for dtype in ["model.dtype=float32", "model.dtype=bfloat16"] {
        let root = TempDir::new().unwrap();
        let bytes = |name: &str, ranks: usize, settings: &[&str]| {
            checkpoint(
                &run(root.path(), name, ranks, &[DETERMINISTIC, &[dtype], settings].concat()),
                8,
            )
        };
        let alone = bytes("alone", 1, &[]);
        assert!(alone.contains_key("ema-00001-of-00001.safetensors"));
        for (word, settings) in &SHARDINGS {
            for ranks in [2, 4] {
                let found = bytes(&format!("{word}-{ranks}"), ranks, settings);
                assert!(found == alone, "{word} on {ranks} ranks, {dtype}");
            }
        }
    }
}

#[test]
fn averages_change_nothing_that_is_trained() {
    let root = TempDir::new().unwrap();
    let with = checkpoint(&run(root.path(), "with", 2, &[]), 8);
    let without =
        tiny(&["max_steps=8", &format!("output_dir={}", root.path().join("x").display())]);
    let without = checkpoint(&train_in_threads(&without, &Resume::Never, 2).unwrap(), 8);
    for file in ["model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"] {
        assert!(with[file] == without[file], "{file}");
    }
}

#[test]
fn a_resume_at_another_world_size_and_sharding_goes_on_with_the_averages() {
    let root = TempDir::new().unwrap();
    for dtype in ["ema.dtype=float32", "ema.dtype=bfloat16"] {
        let settings = |name: &str, settings: &[&str]| {
            let of_run = ["max_steps=12", "ema.every_n_steps=3", "ema.update_after_step=1", dtype];
            config(root.path(), name, &[DETERMINISTIC, &of_run, settings].concat())
        };
        let (whole, parts) = (format!("whole-{dtype}"), format!("parts-{dtype}"));
        let unbroken = train_in_threads(&settings(&whole, &[]), &Resume::Never, 1).unwrap();
        let folder = root.path().join(&parts);
        for (round, (ranks, sharding)) in [(4, 3), (2, 0), (1, 2)].into_iter().enumerate() {
            let resume = if round == 0 { Resume::Never } else { Resume::Latest };
            train_in_threads(&settings(&parts, SHARDINGS[sharding].1), &resume, ranks).unwrap();
            for later in round + 2..=3 {
                let _ = fs::remove_dir_all(folder.join(format!("step-{:08}", 4 * later)));
            }
        }
        assert_eq!(checkpoint(&unbroken, 12), checkpoint(&folder, 12), "{dtype}");
    }
}

/// The lines of a run's log that contain a text.
fn said(run: &Path, text: &str) -> usize {
    let log = fs::read_to_string(run.join("log/rank-00000.jsonl")).unwrap();
    log.lines().filter(|line| line.contains(text)).count()
}

#[test]
fn a_resume_that_turns_averages_on_begins_them_as_its_weights_and_one_that_does_not_drops_them() {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={}", root.path().join("run").display());
    let without = |steps: &'static str| tiny(&[steps, "checkpoint.keep_last=9", &output]);
    let run = train_in_threads(&without("max_steps=4"), &Resume::Never, 1).unwrap();
    let begun = config(root.path(), "run", &["checkpoint.every_n_steps=1"]);
    train_in_threads(&begun, &Resume::Latest, 2).unwrap();
    assert_eq!(said(&run, "the averages of the weights begin at step 4, as its weights"), 1);
    // The first averaging, of update 5, leaves the weights; the next ones are counted from there.
    let (weights, averages) = (saved(&run, 5, "model"), saved(&run, 5, "ema"));
    for (name, weights) in &weights {
        assert!(averages[name].allclose(weights, 1e-6, 1e-7, false), "{name}");
    }
    for (name, weights) in saved(&run, 6, "model") {
        let mut average = averages[&name].copy();
        ema::advance(&mut average, &weights, begun.ema.share_after(2).unwrap());
        assert!(saved(&run, 6, "ema")[&name].equal(&average), "{name}");
    }
    train_in_threads(&without("max_steps=9"), &Resume::Latest, 1).unwrap();
    assert_eq!(said(&run, "the averages of the weights are dropped at step 8"), 1);
    assert_eq!(checkpoint(&run, 9).len(), 3);
}

#[test]
fn work_with_the_averages_sees_them_and_leaves_the_weights_as_they_were() {
    let root = TempDir::new().unwrap();
    for (dtype, narrow) in
        [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
    {
        let kinds = [format!("model.dtype={dtype}"), format!("ema.dtype={narrow}")];
        let config = config(root.path(), "run", &[&kinds[0], &kinds[1]]);
        for ((word, _), ranks) in SHARDINGS.iter().zip([2, 3, 2, 3]) {
            let sharding = fm_dist::settings::Choice::ALL;
            let sharding = sharding.iter().find(|(name, _)| name == word).unwrap().1;
            Threads::run(ranks, |world| {
                let key = |seed| Key::new(seed, Purpose::Test);
                let sharing = Sharing::new(world, sharding, ShardingGroup::World, 1).unwrap();
                let stages = config.stages().unwrap();
                let (kind, one) = (config.model.dtype.kind(), Devices::one(Device::Cpu));
                let mut replica = Replica::shared(stages, kind, one, Some(key(1)), sharing);
                let mut state = OptimizerState::fresh(&replica, &config, one).unwrap();
                let flats = (0..replica.stages.len()).map(|stage| {
                    let numel = replica.stages[stage].params().num_trained();
                    key(2)
                        .scope(stage as u64)
                        .seeded(|| Tensor::randn([numel], (kind, Device::Cpu)))
                });
                let flats: Vec<Tensor> = flats.collect();
                for (stage, flat) in flats.iter().enumerate() {
                    let flat = flat.to_kind(Kind::Float);
                    state.averages.as_mut().unwrap().set(stage, &flat, &replica.buckets[stage]);
                }
                let before = computed(&replica);
                let masters: Vec<Tensor> =
                    (0..flats.len()).map(|stage| replica.parameters(stage).unwrap()).collect();
                let seen = state.with_averages(&mut replica, |replica| Ok(computed(replica)));
                let narrowed = flats.iter().map(|flat| flat.to_kind(config.ema.dtype.kind()));
                for (seen, expected) in seen.unwrap().iter().zip(narrowed) {
                    let expected = expected.to_kind(kind);
                    assert!(seen.equal(&expected), "{word} {dtype} {narrow}");
                }
                let failed: Result<(), Error> = state
                    .with_averages(&mut replica, |_| Err(Error::Stopped { what: "asked".into() }));
                assert!(failed.is_err());
                for (stage, master) in masters.iter().enumerate() {
                    assert!(replica.parameters(stage).unwrap().equal(master), "{word} {dtype}");
                }
                let after = computed(&replica);
                assert!(after.iter().zip(&before).all(|(after, before)| after.equal(before)));
            });
        }
    }
}

/// What each stage computes with, one parameter after another.
fn computed(replica: &Replica<'_>) -> Vec<Tensor> {
    let of_stage = |stage: usize| {
        let gathering =
            replica.buckets[stage].gather(replica.sharing.shards(), &replica.copies).unwrap();
        let weights = gathering.wait(replica.stages[stage].params()).unwrap();
        let flat: Vec<Tensor> =
            weights.leaves().iter().map(|leaf| leaf.detach().flatten(0, -1)).collect();
        Tensor::cat(&flat, 0)
    };
    (0..replica.stages.len()).map(of_stage).collect()
}

fn exported(run: &Path, out: &Path, format: Option<Dialect>, merge: bool) -> Result<(), Error> {
    let (run, out, weights) = (run.into(), out.into(), SavedWeights::Averaged);
    export(&ExportRequest {
        run,
        out,
        max_shard_bytes: 1 << 30,
        dtype: None,
        merge,
        format,
        weights,
    })
}

#[test]
fn samples_and_exports_take_the_averages_where_they_are_asked_for() {
    let root = TempDir::new().unwrap();
    let data = root.path().join("data");
    FLUX.write_data(&data);
    let train = |name: &str, overrides: &[&str]| {
        let overrides = [EMA, &["max_steps=6", "checkpoint.every_n_steps=3"], overrides].concat();
        let config = FLUX.config(&data, &root.path().join(name), &overrides);
        (train_in_threads(&config, &Resume::Never, 1).unwrap(), config)
    };
    let (run, config) = train("whole", &[]);
    let out = root.path().join("folder");
    exported(&run, &out, None, false).unwrap();
    let written = SafeTensors::open(out.join("diffusion_pytorch_model.safetensors")).unwrap();
    let averages = saved(&run, 6, "ema");
    assert!(averages.iter().all(|(name, average)| written.read(name).unwrap().equal(average)));
    let newest = run.join("step-00000006");
    let averaged = SavedWeights::Averaged;
    let replica = trained_replica(&config, &newest, averaged, Device::Cpu, 1.0).unwrap();
    let whole = replica.parameters(0).unwrap();
    let infos = replica.stages[0].params().infos();
    let flat: Vec<Tensor> = infos.iter().map(|info| averages[&info.name].flatten(0, -1)).collect();
    assert!(whole.equal(&Tensor::cat(&flat, 0)));
    // A LoRA's averages, as a file and merged.
    let base = format!("model.path={:?}", out.to_str().unwrap());
    let lora = [base.as_str(), "lora.rank=2", "lora.export=['diffusers']"];
    let (run, _) = train("lora", &lora);
    let averages = saved(&run, 6, "ema");
    assert!(averages.keys().all(|name| name.contains(".lora_")), "A and B only");
    let file = root.path().join("lora.safetensors");
    exported(&run, &file, Some(Dialect::Diffusers), false).unwrap();
    let of_file = SafeTensors::open(&file).unwrap();
    let beside = run.join("step-00000006/lora-ema-diffusers.safetensors");
    let beside = SafeTensors::open(beside).unwrap();
    for info in of_file.tensors() {
        let name = info.name.strip_prefix("transformer.").unwrap();
        let written = of_file.read(&info.name).unwrap();
        assert!(written.equal(&averages[name]), "{name}");
        assert!(written.equal(&beside.read(&info.name).unwrap()), "{name}");
    }
    exported(&run, &root.path().join("merged"), None, true).unwrap();
}

#[test]
fn averages_that_a_checkpoint_lacks_are_refused_by_name() {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={}", root.path().join("run").display());
    let run = train_in_threads(&tiny(&["max_steps=1", &output]), &Resume::Never, 1).unwrap();
    let request = SampleRequest {
        run: Some(run),
        out: vec![root.path().join("out.png")],
        num_steps: Some(1),
        per_condition: Some(1),
        weights: SavedWeights::Averaged,
        ..SampleRequest::default()
    };
    let error = sample(&request).unwrap_err();
    assert_eq!(error.exit_code(), 50);
    let text = error.to_string();
    assert!(text.contains("--ema") && text.contains("holds no averages of its weights"), "{text}");
}
