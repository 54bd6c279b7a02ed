//! What is frozen may be held in fewer bits, and in host memory: the same bits on any number of
//! ranks and under every sharding, an exact resume, and the base itself where it is asked for.

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::collective::Threads;
use fm_dist::model::Dit;
use fm_dist::nn::{Activations, FrozenDtype};
use fm_dist::parallel::{Devices, Recompute, Replica, Sharding, ShardingGroup, Sharing};
use fm_dist::rng::{Key, Purpose};
use fm_dist::run::Resume;
use fm_dist::settings::Choice;
use fm_dist::tuning::{LoraSettings, Tuning};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::real_heads::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, WAN};
use super::sharding::SHARDINGS;
use crate::runs::{checkpoint, tiny, train_in_threads};

const LORA: &[&str] =
    &["lora.rank=4", "lora.target_modules=['all-linear']", "model.dtype=bfloat16"];

/// Settings under which every number of ranks sums alike.
const DETERMINISTIC: &[&str] =
    &["parallel.deterministic=true", "parallel.seed_scope=sample", "train.global_batch_size=64"];

fn held_in(form: &str) -> String {
    format!("model.frozen_dtype={form}")
}

fn digits(root: &Path, name: &str, ranks: usize, overrides: &[&str]) -> PathBuf {
    let output = format!("output_dir={}", root.join(name).display());
    let config = tiny(&[LORA, &["max_steps=6", output.as_str()], overrides].concat());
    train_in_threads(&config, &Resume::Never, ranks).unwrap()
}

#[test]
fn every_form_is_bit_equal_at_every_world_size_and_under_every_sharding() {
    let mut before: Vec<_> = Vec::new();
    for (word, _) in FrozenDtype::ALL {
        let (root, form) = (TempDir::new().unwrap(), held_in(word));
        let run = |name: &str, ranks: usize, settings: &[&str]| {
            let overrides = [DETERMINISTIC, &[form.as_str()], settings].concat();
            checkpoint(&digits(root.path(), name, ranks, &overrides), 6)
        };
        let alone = run("alone", 1, &[]);
        for ranks in [2, 4, 8] {
            assert!(run(&format!("ranks-{ranks}"), ranks, &[]) == alone, "{ranks} ranks, {word}");
        }
        assert!(run("again", 2, &["parallel.recompute=always"]) == alone, "recomputed, {word}");
        for (sharding, settings) in &SHARDINGS[1..] {
            assert!(run(sharding, 2, settings) == alone, "{sharding} on 2 ranks, {word}");
        }
        let weights = alone["model-00001-of-00001.safetensors"].clone();
        assert!(!before.contains(&weights), "{word} holds other numbers");
        before.push(weights);
    }
}

#[test]
fn bfloat16_is_what_a_model_in_bfloat16_has_anyway() {
    let root = TempDir::new().unwrap();
    let [plain, named] = [&[][..], &["model.frozen_dtype=bfloat16"]].map(|settings| {
        checkpoint(&digits(root.path(), &format!("run-{}", settings.len()), 2, settings), 6)
    });
    assert!(plain["model-00001-of-00001.safetensors"] == named["model-00001-of-00001.safetensors"]);
}

#[test]
fn a_resume_at_another_world_size_packs_the_base_again() {
    for (word, _) in FrozenDtype::ALL {
        let (root, form) = (TempDir::new().unwrap(), held_in(word));
        let config = |name: &str, settings: &[&str]| {
            let output = format!("output_dir={}", root.path().join(name).display());
            let steps = ["checkpoint.every_n_steps=4", "max_steps=8"];
            let own = [output.as_str(), form.as_str()];
            tiny(&[LORA, DETERMINISTIC, &steps[..], &own, settings].concat())
        };
        let unbroken = train_in_threads(&config("unbroken", &[]), &Resume::Never, 1).unwrap();
        let broken = train_in_threads(&config("broken", &[]), &Resume::Never, 4).unwrap();
        fs::remove_dir_all(broken.join("step-00000008")).unwrap();
        let sharded = SHARDINGS[3].1;
        train_in_threads(&config("broken", sharded), &Resume::Latest, 2).unwrap();
        assert_eq!(checkpoint(&unbroken, 8), checkpoint(&broken, 8), "{word}");
    }
}

/// What a form costs, in all families at real head widths: of a step in bfloat16, the difference of
/// the prediction and of all gradients, against the same step with frozen weights in bfloat16. The
/// bounds are 1.3 times the largest that were measured.
#[test]
fn forms_are_as_far_from_bfloat16_as_stated() {
    for (word, most) in [
        ("float8_e4m3", [9.3e-3, 1.28e-2]),
        ("float8_e4m3_rows", [9.3e-3, 1.14e-2]),
        ("nf4", [2.2e-2, 3.5e-2]),
    ] {
        for family in [FLUX, FLUX2, QWEN_IMAGE, WAN, HUNYUAN_VIDEO15] {
            let form = held_in(word);
            let lora = &LORA[..2];
            let found = family.differences([lora, &[lora, &[form.as_str()]].concat()]);
            println!("| {word} | {} | {:.2e} | {:.2e} |", family.name, found[0], found[1]);
            assert!(found.iter().zip(most).all(|(found, most)| *found < most), "{found:?}");
            assert!(found[0] > 1e-3, "{found:?}: nothing is packed");
        }
    }
}

const KEY: Key = Key { seed: 5, purpose: Purpose::Test, step: 0, micro_batch: 0, scope: 0 };

/// A model whose blocks are frozen in a form, with low-rank changes.
fn replica<'c>(form: Option<FrozenDtype>, devices: Devices, sharing: Sharing<'c>) -> Replica<'c> {
    let lora = LoraSettings {
        rank: Some(3),
        target_modules: vec!["all-linear".into()],
        ..LoraSettings::default()
    };
    let model = Dit { width: 32, depth: 3, num_heads: 2, ..Dit::default() };
    let tuning = Tuning { trainable: &[], lora: &lora, frozen_form: form };
    let stages = tuning.of(&model).unwrap();
    let mut replica = Replica::shared(stages, Kind::BFloat16, devices, None, sharing);
    for (stage, bucket) in replica.stages.iter().zip(&mut replica.buckets) {
        let draw = || Tensor::randn([stage.params().numel()], (Kind::Float, Device::Cpu)) * 0.1;
        bucket.set(&KEY.named(stage.params().stage()).seeded(draw));
    }
    replica
}

/// Prediction and gradients of a step.
fn step(replica: &Replica<'_>) -> Vec<Tensor> {
    let drawn = |scope: u64, size: &[i64]| {
        let draw = || Tensor::randn(size, (Kind::Float, Device::Cpu));
        KEY.step(1).scope(scope).seeded(draw).to_kind(Kind::BFloat16)
    };
    let input = Activations::new()
        .with("hidden_states", drawn(0, &[2, 1, 8, 8]))
        .with("timestep", drawn(1, &[2]).abs().to_kind(Kind::Float))
        .with("encoder_hidden_states", drawn(2, &[2, 1, 10]));
    let mut tape = replica.tape(Recompute::Always);
    let output = tape.forward(input).unwrap();
    let (_, prediction) = output.flowing().next().unwrap();
    let loss = prediction.to_kind(Kind::Float).square().mean(Kind::Float);
    let mut found = vec![prediction.detach()];
    tape.backward(&loss, |_, gradients| {
        found.extend(gradients);
        Ok(())
    })
    .unwrap();
    found
}

/// True if one is the other with perhaps more padding, which depends on the number of ranks.
fn is_same(found: &Tensor, expected: &Tensor) -> bool {
    let [found, expected] = [found, expected].map(|tensor| tensor.flatten(0, -1));
    let (all, length) = (found.numel() as i64, expected.numel() as i64);
    let same = found.narrow(0, 0, length.min(all)).equal(&expected.narrow(0, 0, length.min(all)));
    let rest = found.narrow(0, length.min(all), (all - length).max(0));
    same && all >= length && rest.eq(0.0).all().double_value(&[]) == 1.0
}

#[test]
fn what_waits_in_host_memory_computes_the_same_bits_under_every_sharding() {
    let here = Devices::one(Device::Cpu);
    let streamed = Devices { streams_frozen: true, ..here };
    for form in [None, Some(FrozenDtype::Float8), Some(FrozenDtype::Nf4)] {
        let expected = step(&replica(form, here, Sharing::alone()));
        assert!(expected.len() > 4);
        for sharding in
            [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters]
        {
            let found = Threads::run(2, |world| {
                let sharing = Sharing::new(world, sharding, ShardingGroup::World, 1).unwrap();
                let replica = replica(form, streamed, sharing);
                (step(&replica), step(&replica))
            });
            for (first, second) in &found {
                for found in [first, second] {
                    let equal = found.iter().zip(&expected).all(|(a, b)| is_same(a, b));
                    assert!(equal && found.len() == expected.len(), "{form:?} {sharding:?}");
                }
            }
        }
    }
}
