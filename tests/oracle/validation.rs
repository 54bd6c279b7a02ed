//! A validation's losses are NeMo AutoModel's, of the same weights, samples and noise.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use fm_dist::assembly::validation::ValidationSet;
use fm_dist::assembly::{build_pipeline, dataset};
use fm_dist::config::RunConfig;
use fm_dist::files::safetensors;
use fm_dist::rng::{Key, Purpose, Stream};
use fm_dist::run::Resume;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{LOSS, entries, fresh_seed, oracle};
use crate::runs::{tiny, train_in_threads};
use crate::threads::validation::validations;

const SIGMAS: [f64; 4] = [0.05, 0.3, 0.625, 1.0];

/// Latents, texts and noise of every sample that is judged, as this program draws them: a stream
/// of its own for each sample, from the hash of its file and its place there.
fn write_draws(config: &RunConfig, path: &Path) -> u64 {
    let trained = Arc::new(dataset(config).unwrap());
    let set = ValidationSet::of(config, &trained).unwrap().unwrap();
    let rules = build_pipeline(config, Device::Cpu).draw_rules();
    let mut parts: BTreeMap<&str, Vec<Tensor>> = BTreeMap::new();
    for block in set.blocks.iter() {
        let batch = set.dataset.batch(&block.ids).unwrap();
        let stream = |number: u64| {
            let key = Key::new(config.seed, Purpose::Validation).micro_batch(number);
            let of_sample = |id: &u64| key.scope(set.dataset.sample_hash(*id));
            Stream::PerSample(block.ids.iter().map(of_sample).collect())
        };
        let latents = batch.tensors["image_latents"].shallow_clone();
        let training = rules.draw(&batch, &stream(1), None).unwrap();
        let noise = stream(0).open().normal(0.0, 1.0, &latents.size());
        for (name, tensor) in [
            ("latents", latents),
            ("text", batch.tensors["text_embeddings"].shallow_clone()),
            ("noise", noise),
            ("training.noise", training.noise),
            ("training.sigma", training.sampled.sigma),
            ("training.drop", training.drop.unwrap().to_kind(Kind::Int64)),
        ] {
            parts.entry(name).or_default().push(tensor);
        }
    }
    let whole: Vec<(&str, Tensor)> =
        parts.into_iter().map(|(name, parts)| (name, Tensor::cat(&parts, 0))).collect();
    let borrowed: Vec<(&str, &Tensor)> =
        whole.iter().map(|(name, tensor)| (*name, tensor)).collect();
    safetensors::write(&mut File::create(path).unwrap(), &borrowed, &BTreeMap::new()).unwrap();
    set.num_samples()
}

#[test]
fn losses_at_fixed_sigmas_and_val_loss_are_nemo_automodels() {
    let root = TempDir::new().unwrap();
    let path = |name: &str| root.path().join(name).display().to_string();
    let (seed, output) = (fresh_seed("validation"), format!("output_dir={}", path("run")));
    // A loss of training that is neither squared nor unweighted, with dropped texts.
    let config = tiny(&[
        &format!("seed={seed}"),
        &output,
        "max_steps=6",
        "validation.share=0.2",
        "validation.max_samples=45",
        &format!("validation.sigmas={SIGMAS:?}"),
        "flow_matching.use_loss_weighting=true",
        "flow_matching.flow_shift=2.5",
        "flow_matching.cfg_dropout=per_sample",
        "flow_matching.cfg_dropout_prob=0.4",
        "optimizer.adamw.lr=0.01",
        "lr_scheduler.cosine.warmup_steps=0",
    ]);
    let run = train_in_threads(&config, &Resume::Never, 2).unwrap();
    assert_eq!(write_draws(&config, &root.path().join("draws.safetensors")), 45);
    let pipeline = serde_json::json!({"flow_shift": 2.5, "use_loss_weighting": true});
    let arguments = serde_json::json!({
        "sigmas": SIGMAS, "depth": 2, "heads": 4, "patch": 2, "batch": 8, "pipeline": pipeline,
    });
    std::fs::write(path("arguments.json"), arguments.to_string()).unwrap();
    let checkpoint = run.join("step-00000006/model-00001-of-00001.safetensors");
    oracle(
        "validation.py",
        &[
            checkpoint.to_str().unwrap(),
            &path("draws.safetensors"),
            &path("answer.json"),
            &path("arguments.json"),
        ],
    );
    let answer = entries(&root.path().join("answer.json"));
    let last = validations(&run).pop().unwrap();
    assert_eq!(last["step"], 6);
    let by_sigma: Vec<f64> =
        answer["by_sigma"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
    let close = |found: &serde_json::Value, expected: f64, what: &str| {
        let found = found.as_f64().unwrap();
        let difference = (found - expected).abs() / expected;
        println!("{what}: {found} and {expected}, {difference:e} apart");
        assert!(difference < LOSS, "{what}: {found}, expected {expected}");
    };
    for (place, (sigma, expected)) in SIGMAS.iter().zip(&by_sigma).enumerate() {
        close(&last["validation_loss_per_sigma"][place], *expected, &format!("sigma {sigma}"));
    }
    close(&last["validation_loss"], by_sigma.iter().sum::<f64>() / 4.0, "validation_loss");
    close(&last["val_loss"], answer["val_loss"].as_f64().unwrap(), "val_loss");
}
