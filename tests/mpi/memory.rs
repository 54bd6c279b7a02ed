//! Ranks take the memory that `fm-dist check` says, and sharding saves what it is for. On a CPU,
//! where the system tells the peak of a process; `launch/test-gpu.sh` has the same for GPUs.

use bytesize::ByteSize;
use tempfile::TempDir;

use crate::runs::{column, finish, mpirun, program, with_sets};

/// How far a run may be from the estimate.
const TOLERANCE: f64 = 0.1;

/// Every sharding recomputes, so that the rest is state.
const SHARDINGS: [&str; 4] = ["none", "optimizer", "gradients", "parameters"];

/// A model and a step in two micro-batches of two samples. The only save is after the last step:
/// its copy is told apart. The report at the end is as short as can be.
fn settings<'s>(model: &[&'s str], batch: &'s str) -> Vec<&'s str> {
    let step = [
        "data.micro_batch_size_per_gpu=2",
        batch,
        "parallel.recompute=always",
        "max_steps=3",
        "checkpoint.every_n_steps=100",
    ];
    let report = ["sampling.num_steps=1", "sampling.per_condition=1"];
    [model, &step, &report].concat()
}

/// Bytes of a rank at the worst moment of a step under each sharding.
fn measured(ranks: usize, model: &[&str], batch: &str) -> [f64; 4] {
    SHARDINGS.map(|word| {
        let root = TempDir::new().unwrap();
        let (output, sharding) = (
            format!("output_dir={}", root.path().join("run").display()),
            format!("parallel.sharding={word}"),
        );
        let overrides = [settings(model, batch), vec![output.as_str(), sharding.as_str()]].concat();
        let (code, _, errors) = finish(mpirun(ranks, &with_sets(&["train"], &overrides)));
        assert_eq!(code, 0, "{errors}");
        column(&root.path().join("run"), "peak_memory_bytes").last().unwrap().1
    })
}

/// What `check` says of them: the second column, behind that of one rank.
fn predicted(ranks: usize, model: &[&str], batch: &str) -> [f64; 4] {
    let world = ranks.to_string();
    let (code, plan, errors) =
        finish(program(&with_sets(&["check", "--world", &world], &settings(model, batch))));
    assert_eq!(code, 0, "{errors}");
    SHARDINGS.map(|word| {
        let line = plan
            .lines()
            .find_map(|line| line.strip_prefix(&format!("  {word} ")))
            .unwrap_or_else(|| panic!("no {word} in\n{plan}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        words[2..4].join(" ").parse::<ByteSize>().unwrap().as_u64() as f64
    })
}

/// Compares, and returns what was measured.
fn check(ranks: usize, model: &[&str]) -> [f64; 4] {
    let batch = format!("train.global_batch_size={}", 4 * ranks);
    let (measured, predicted) = (measured(ranks, model, &batch), predicted(ranks, model, &batch));
    for ((word, measured), predicted) in SHARDINGS.iter().zip(measured).zip(predicted) {
        println!("{ranks} ranks, {word}: {measured:.3e} bytes, check says {predicted:.3e}");
        assert!(
            (measured - predicted).abs() < TOLERANCE * predicted,
            "{ranks} ranks, {word}: {measured} bytes, check says {predicted}"
        );
    }
    measured
}

/// Stages whose halves are beyond 32 MiB: smaller blocks glibc takes from a heap that it does not
/// give back at once.
#[test]
fn a_rank_takes_what_check_says_under_every_sharding() {
    let [none, optimizer, gradients, parameters] =
        check(2, &["model.dit.width=1024", "model.dit.depth=4", "model.dit.num_heads=16"]);
    assert!(parameters < gradients && gradients < optimizer && optimizer < none);
}

#[test]
fn averages_take_what_check_says_under_every_sharding() {
    let model = ["model.dit.width=1024", "model.dit.depth=4", "model.dit.num_heads=16"];
    let averages = [&model[..], &["ema.decay=0.99"]].concat();
    let [with_averages, ..] = check(2, &averages);
    let [without, ..] = predicted(2, &model, "train.global_batch_size=8");
    assert!(with_averages > 1.1 * without, "{with_averages} of {without} bytes");
}

/// A LoRA on the attention of a frozen model.
const LORA: [&str; 2] = ["model.dtype=bfloat16", "lora.rank=16"];

#[test]
fn a_lora_takes_what_check_says_and_a_part_of_what_its_model_does() {
    let model = ["model.dit.width=1024", "model.dit.depth=8", "model.dit.num_heads=16"];
    let [none, .., parameters] = check(2, &[&model[..], &LORA].concat());
    assert!(parameters < none);
    let [whole, ..] = predicted(2, &[&model[..], &LORA[..1]].concat(), "train.global_batch_size=8");
    assert!(none < 0.35 * whole, "{none} of {whole} bytes");
}

#[test]
#[ignore = "takes 20 GB of memory and ten minutes"]
fn three_hundred_million_parameters_take_what_check_says() {
    let model = ["model.dit.width=1024", "model.dit.depth=16", "model.dit.num_heads=16"];
    check(2, &model);
    let [none, .., parameters] = check(4, &model);
    assert!(parameters < 0.45 * none, "{parameters} of {none} bytes");
    let [whole, ..] = check(2, &[&model[..], &LORA[..1]].concat());
    let [lora, ..] = check(2, &[&model[..], &LORA].concat());
    assert!(lora < 0.35 * whole, "{lora} of {whole} bytes");
}
