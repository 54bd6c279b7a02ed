//! GPU memory: a run takes what `fm-dist check` says, whatever is sharded, recomputed and
//! offloaded.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use bytesize::ByteSize;
use tempfile::TempDir;

use super::{LARGE, num_gpus};
use crate::runs::{finish, program, with_sets};

/// How far the memory of a run may be from what `fm-dist check` says: its promise, and what
/// libtorch's allocator rounds up.
const OTHER_MEMORY: f64 = 0.1;

/// Three steps of one micro-batch each, whose activations are half of a kept graph's memory.
const STEPS: [&str; 4] = [
    "max_steps=3",
    "data.micro_batch_size_per_gpu=128",
    "train.global_batch_size=128",
    "checkpoint.save_last=false",
];

/// Words of `parallel.sharding`, `parallel.recompute` and `parallel.offload`. One GPU has nobody to
/// share with, and must not pay for trying.
const CHOICES: [[&str; 3]; 9] = [
    ["none", "never", "none"],
    ["none", "every_2", "none"],
    ["none", "always", "none"],
    ["optimizer", "always", "none"],
    ["gradients", "always", "none"],
    ["parameters", "always", "none"],
    ["none", "always", "activations"],
    ["none", "always", "optimizer"],
    ["none", "always", "all"],
];

#[test]
#[ignore = "needs a CUDA device"]
fn a_run_takes_the_memory_that_check_says_however_it_is_spared() {
    let root = TempDir::new().unwrap();
    // The same program with a model of no size holds what CUDA, its kernels and its libraries take.
    let around = peak_bytes(root.path(), &["max_steps=3", "parallel.device=\"cuda\""]);
    println!("| around a run of no size | {}", ByteSize(around as u64));
    let mut wrong = Vec::new();
    for [sharding, recompute, offload] in CHOICES {
        let chosen = [
            format!("parallel.sharding={sharding}"),
            format!("parallel.recompute={recompute}"),
            format!("parallel.offload={offload}"),
        ];
        let chosen: Vec<&str> = chosen.iter().map(String::as_str).collect();
        let overrides = [&LARGE[..], &STEPS, &chosen].concat();
        let predicted = predicted_bytes(&overrides, sharding);
        let taken = peak_bytes(root.path(), &overrides) - around;
        let row = format!(
            "| sharding {sharding}, recompute {recompute}, offload {offload} | took {} | check says {} | ratio {:.2}",
            ByteSize(taken as u64),
            ByteSize(predicted as u64),
            taken / predicted
        );
        println!("{row}");
        if (taken - predicted).abs() > OTHER_MEMORY * predicted {
            wrong.push(row);
        }
    }
    assert!(wrong.is_empty(), "more than {OTHER_MEMORY} off:\n{}", wrong.join("\n"));
}

/// Bytes of a rank alone, by `check`.
fn predicted_bytes(overrides: &[&str], sharding: &str) -> f64 {
    let (code, plan, told) = finish(program(&with_sets(&["check"], overrides)));
    assert_eq!(code, 0, "{told}");
    words_after(&plan, &format!("  {sharding} ")).parse::<ByteSize>().unwrap().as_u64() as f64
}

/// `12.3 GiB` behind the name of a line of the plan.
fn words_after(plan: &str, name: &str) -> String {
    let line = plan
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap_or_else(|| panic!("no line {name:?} in\n{plan}"));
    line.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

/// Bytes of the first GPU that nothing uses. The driver's, without libtorch.
#[allow(unsafe_code)]
fn free_bytes() -> usize {
    use cudarc::driver::result;
    assert!(num_gpus() > 0, "the driver shows no GPU");
    let device = result::device::get(0).unwrap();
    // SAFETY: the device is one of the driver's, and its context is kept until the end of the
    // process.
    unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()).unwrap() };
    result::mem_get_info().unwrap().0
}

/// Attention by name: trying all backends takes memory of the GPU that is not the run's.
const ATTENTION: &str = "compute.attention=\"efficient\"";

/// Most memory of the first GPU that was in use while the program trained, less what was in use
/// before.
fn peak_bytes(root: &Path, overrides: &[&str]) -> f64 {
    let before = free_bytes();
    let output = format!("output_dir={}", root.join("memory").display());
    let arguments = with_sets(
        &["train"],
        &[overrides, &["model.dit.num_heads=4", ATTENTION, &output]].concat(),
    );
    let mut command: Command = program(&arguments);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut least = before;
    let status = loop {
        least = least.min(free_bytes());
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        thread::yield_now();
    };
    assert!(status.success(), "{arguments:?}: {status}");
    fs::remove_dir_all(root.join("memory")).unwrap();
    (before - least) as f64
}
