//! What must not change the result does not: the number of ranks, the cut into micro-batches,
//! recomputation.

use std::path::{Path, PathBuf};

use fm_dist::run::Resume;
use tempfile::TempDir;

use crate::runs::{checkpoint, column, tiny, train_in_threads};

/// The same sums in another order: f32 rounding, grown over ten steps of training.
const ROUNDING: f64 = 2e-4;

fn run(root: &Path, name: &str, ranks: usize, overrides: &[&str]) -> PathBuf {
    let output = format!("output_dir={}", root.join(name).display());
    let config = tiny(&[&["max_steps=10", output.as_str()], overrides].concat());
    train_in_threads(&config, &Resume::Never, ranks).unwrap()
}

pub fn assert_same_curve(one: &Path, other: &Path, what: &str) {
    for name in [
        "loss",
        "unweighted_loss",
        "sigma_mean",
        "sigma_min",
        "sigma_max",
        "noisy_max",
        "grad_norm",
    ] {
        let (a, b) = (column(one, name), column(other, name));
        assert_eq!(a.len(), 10);
        for ((step, a), (_, b)) in a.iter().zip(&b) {
            assert!(
                (a - b).abs() <= ROUNDING * a.abs().max(1.0),
                "{what}: {name} at step {step}: {a} and {b}"
            );
        }
    }
}

#[test]
fn one_two_and_four_ranks_train_alike() {
    let root = TempDir::new().unwrap();
    let one = run(root.path(), "one", 1, &[]);
    for ranks in [2, 4] {
        assert_same_curve(
            &one,
            &run(root.path(), &format!("ranks-{ranks}"), ranks, &[]),
            &format!("{ranks} ranks"),
        );
    }
}

#[test]
fn micro_batches_accumulate_to_the_large_batch() {
    let root = TempDir::new().unwrap();
    let small = run(root.path(), "small", 1, &["data.micro_batch_size_per_gpu=4"]);
    let large = run(root.path(), "large", 1, &["data.micro_batch_size_per_gpu=32"]);
    assert_same_curve(&small, &large, "8 x 4 against 1 x 32");
}

#[test]
fn recomputation_changes_no_bit() {
    let root = TempDir::new().unwrap();
    let kept = run(root.path(), "kept", 2, &[]);
    let recomputed = run(root.path(), "recomputed", 2, &["parallel.recompute=always"]);
    assert_eq!(checkpoint(&kept, 10), checkpoint(&recomputed, 10));
}

#[test]
fn the_same_run_twice_gives_the_same_bits() {
    let root = TempDir::new().unwrap();
    for scope in ["rank", "sample"] {
        let overrides = [format!("parallel.seed_scope={scope}")];
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        let first = run(root.path(), &format!("{scope}-first"), 2, &overrides);
        let second = run(root.path(), &format!("{scope}-second"), 2, &overrides);
        assert_eq!(checkpoint(&first, 10), checkpoint(&second, 10), "{scope}");
    }
}

#[test]
fn noise_that_is_drawn_ahead_is_that_of_its_place_whoever_draws_it_and_when() {
    let root = TempDir::new().unwrap();
    let parameters = |name: &str, overrides: &[&str]| {
        let overrides =
            [&["data.micro_batch_size_per_gpu=4", "parallel.seed_scope=rank"], overrides].concat();
        let folder = run(root.path(), name, 2, &overrides);
        let (waits, steps) = (column(&folder, "draw_seconds"), column(&folder, "step_seconds"));
        assert!(waits.iter().zip(&steps).all(|(wait, step)| (0.0..step.1).contains(&wait.1)));
        checkpoint(&folder, 10).remove("model-00001-of-00001.safetensors").unwrap()
    };
    let expected = parameters("plain", &[]);
    for overrides in [&["data.prefetch=1"], &["data.prefetch=5"], &["flow_matching.draws=device"]] {
        let name = overrides[0].replace(['.', '='], "-");
        assert!(parameters(&name, overrides) == expected, "{overrides:?}");
    }
}

#[test]
fn ranks_draw_from_streams_of_their_own() {
    let root = TempDir::new().unwrap();
    let by_rank = run(root.path(), "rank", 2, &["parallel.seed_scope=rank"]);
    let by_sample = run(root.path(), "sample", 2, &[]);
    assert_ne!(column(&by_rank, "sigma_mean"), column(&by_sample, "sigma_mean"));
    // Two ranks with one stream would repeat every sigma: 32 samples, 16 distinct values.
    let spread = column(&by_rank, "sigma_std");
    assert!(spread.iter().all(|(_, std)| *std > 0.05), "{spread:?}");
}

#[test]
fn stratified_timesteps_cover_the_global_batch_evenly_on_any_number_of_ranks() {
    let root = TempDir::new().unwrap();
    let overrides =
        ["flow_matching.stratified_timesteps=true", "flow_matching.timestep_sampling=uniform"];
    for ranks in [1, 4] {
        let folder = run(root.path(), &format!("strata-{ranks}"), ranks, &overrides);
        let lines = fm_dist::telemetry::metrics::read(&folder.join("metrics.jsonl")).unwrap();
        for line in lines {
            let histogram: Vec<f64> = line["sigma_histogram"]
                .as_array()
                .unwrap()
                .iter()
                .map(|count| count.as_f64().unwrap())
                .collect();
            // 32 samples over 10 bins: each bin of 3.2 holds 2 to 5 whole slices, where independent
            // draws would leave gaps.
            assert!(
                histogram.iter().all(|count| (2.0..=5.0).contains(count)),
                "{ranks} ranks: {histogram:?}"
            );
        }
    }
}

#[test]
fn bfloat16_trains_with_float32_masters() {
    let root = TempDir::new().unwrap();
    let folder = run(
        root.path(),
        "bf16",
        2,
        &["model.dtype=bfloat16", "max_steps=30", "lr_scheduler.cosine.warmup_steps=5"],
    );
    let losses = column(&folder, "loss");
    let mean =
        |part: &[(f64, f64)]| part.iter().map(|point| point.1).sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[20..]) < 0.9 * mean(&losses[..5]), "{losses:?}");
}
