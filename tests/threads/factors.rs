//! Factors of learning rate and decay train alike on any ranks; what they name is what changes.

use std::path::{Path, PathBuf};

use fm_dist::error::Error;
use fm_dist::run::Resume;
use tempfile::TempDir;

use super::averages::saved;
use super::sharding::SHARDINGS;
use crate::runs::{checkpoint, tiny, train_in_threads};

const FACTORS: &[&str] = &[
    "optimizer.decay=all",
    "optimizer.lr_factors={'blocks.*'=0.5, 'blocks.*.bias'=2.0, 'linear'=0.0}",
    "optimizer.decay_factors={'*.bias'=0.0, 'blocks.1'=10.0}",
    "optimizer.adamw.weight_decay=0.1",
];

fn run(root: &Path, name: &str, ranks: usize, overrides: &[&str]) -> Result<PathBuf, Error> {
    let output = format!("output_dir={}", root.join(name).display());
    let config = tiny(&[&["max_steps=6", output.as_str()], overrides].concat());
    train_in_threads(&config, &Resume::Never, ranks)
}

#[test]
fn factors_are_bit_equal_at_every_world_size_and_under_every_sharding() {
    let root = TempDir::new().unwrap();
    let deterministic =
        ["parallel.deterministic=true", "parallel.seed_scope=sample", "train.global_batch_size=32"];
    for dtype in ["model.dtype=float32", "model.dtype=bfloat16"] {
        let bytes = |name: &str, ranks: usize, settings: &[&str]| {
            let overrides = [FACTORS, &deterministic, &[dtype, "ema.decay=0.9"], settings].concat();
            checkpoint(&run(root.path(), &format!("{name} {dtype}"), ranks, &overrides).unwrap(), 6)
        };
        let alone = bytes("alone", 1, &[]);
        for (word, settings) in &SHARDINGS {
            for ranks in [2, 4] {
                let found = bytes(&format!("{word}-{ranks}"), ranks, settings);
                assert!(found == alone, "{word} on {ranks} ranks, {dtype}");
            }
        }
    }
}

#[test]
fn a_factor_of_zero_leaves_its_parameters_and_no_others_as_they_began() {
    let root = TempDir::new().unwrap();
    let one = "max_steps=1";
    let first = run(root.path(), "first", 1, &[one, "optimizer.adamw.lr=0"]).unwrap();
    let begun = saved(&first, 1, "model");
    let run = run(root.path(), "run", 2, &["optimizer.lr_factors={'blocks.1'=0}"]).unwrap();
    for (name, values) in saved(&run, 6, "model") {
        let stays = name.starts_with("blocks.1.");
        assert_eq!(values.equal(&begun[&name]), stays, "{name}");
    }
}

#[test]
fn factors_of_one_change_no_bit() {
    let root = TempDir::new().unwrap();
    let ones = ["optimizer.lr_factors={'*'=1.0}", "optimizer.decay_factors={'*'=1.0}"];
    let model = |name: &str, overrides: &[&str]| {
        let run = run(root.path(), name, 2, overrides).unwrap();
        checkpoint(&run, 6).remove("model-00001-of-00001.safetensors").unwrap()
    };
    assert!(model("ones", &ones) == model("none", &[]));
}
