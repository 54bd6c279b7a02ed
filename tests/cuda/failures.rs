//! A GPU that fails or has too little memory ends the program by name: in the words of the real
//! libtorch, with what the real NVML knows.

use std::process::Command;
use std::time::Duration;

use fm_dist::collective;
use fm_dist::cuda::{health, open_libtorch};
use fm_dist::phase::Phase;
use fm_dist::pulse;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::runs::{finish, program, with_sets};
use crate::worlds::{FAILS_NOW, Outcome, run};

/// Time from the failure to the end of the process, as promised.
const PROMISED: Duration = Duration::from_secs(5);

/// A process that ends as the program does, with libtorch on the first GPU.
fn begin() {
    std::panic::set_hook(Box::new(|panic| collective::end_after_panic(panic)));
    open_libtorch().unwrap_or_else(|error| collective::end_with(error));
    health::watch(0);
    println!("faults before: {:?}", health::faults());
    pulse::begin_step(1);
    pulse::enter(Phase::Forward);
    pulse::enter_stage(2);
    println!("{FAILS_NOW}");
}

/// Runs a program of this file, which must end in time with this code and one line that has the
/// words.
fn ends(program: &str, code: i32, words: &[&str]) {
    let child = Command::new(std::env::current_exe().unwrap());
    let Outcome { code: found, output, survived } = run(child, program);
    assert_eq!(found, Some(code), "{output}");
    let lines: Vec<&str> =
        output.lines().filter(|line| line.starts_with("fm-dist: error")).collect();
    assert_eq!(lines.len(), 1, "{output}");
    println!("{}", lines[0]);
    words.iter().for_each(|word| assert!(lines[0].contains(word), "{word:?}: {output}"));
    assert!(survived.expect("the process said that it fails") < PROMISED, "{output}");
}

/// Reads behind the end of a tensor, which the kernel asserts against.
pub fn process_whose_kernel_fails() {
    begin();
    let numbers = Tensor::arange(10, (Kind::Float, Device::Cuda(0)));
    let outside = Tensor::from_slice(&[1000i64]).to_device(Device::Cuda(0));
    let read = numbers.index_select(0, &outside);
    println!("no failure: {}", read.double_value(&[0]));
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_kernel_that_fails_ends_the_process_with_code_23_and_the_drivers_words() {
    let words = [
        "error DEVICE rank 0/1",
        "step 1 phase forward stage 2: CUDA error: ",
        "Kernels run behind the host, so the place may be late: CUDA_LAUNCH_BLOCKING=1 finds it",
    ];
    ends("cuda::failures::process_whose_kernel_fails", 23, &words);
}

/// Asks for a terabyte.
pub fn process_whose_memory_runs_out() {
    begin();
    let numbers = Tensor::empty([1 << 38], (Kind::Float, Device::Cuda(0)));
    println!("no failure: {:?}", numbers.size());
}

#[test]
#[ignore = "needs a CUDA device"]
fn memory_that_runs_out_ends_the_process_with_code_53_and_its_numbers() {
    let words = [
        "error MEMORY rank 0/1",
        "step 1 phase forward stage 2: CUDA out of memory. Tried to allocate 1024.00 GiB",
        " is free. ",
    ];
    ends("cuda::failures::process_whose_memory_runs_out", 53, &words);
}

/// 200 GiB of activations, and 20 with recomputation: as `check` says.
const TOO_LARGE: [&str; 9] = [
    "parallel.device=\"cuda\"",
    "model.dit.width=1024",
    "model.dit.depth=24",
    "model.dit.num_heads=16",
    "model.dit.patch_size=1",
    "data.micro_batch_size_per_gpu=1600",
    "train.global_batch_size=1600",
    "sampling.num_steps=1",
    "max_steps=2",
];

#[test]
#[ignore = "needs a CUDA device"]
fn a_run_that_is_too_large_is_told_the_choice_that_fits_and_fits_with_it() {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={}", root.path().join("run").display());
    let train = |more: &[&str]| {
        finish(program(&with_sets(&["train"], &[&TOO_LARGE, more, &[&output]].concat())))
    };
    let (code, _, errors) = train(&[]);
    println!("{}", errors.lines().last().unwrap_or_default());
    assert_eq!(code, 53, "{errors}");
    for words in [
        "step 1 phase forward stage ",
        "CUDA out of memory. Tried to allocate ",
        "; check predicted 2",
        " GiB with parallel.recompute = \"always\". exit 53",
    ] {
        assert!(errors.contains(words), "{words:?} was not said:\n{errors}");
    }
    let (code, _, errors) = train(&["parallel.recompute=\"always\""]);
    assert_eq!(code, 0, "{errors}");
}
