//! Backends of attention are tried before they are used.

use std::fs;

use fm_dist::attention::{Machine, Trial, standard_cases, table};
use fm_dist::cuda::open_libtorch;
use fm_dist::libtorch::AttentionBackend;
use fm_dist::nn::attention::{Attention, open_on};
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::runs::{finish, program, with_sets};

/// Every backend in the standard cases; `cargo test … -- --nocapture` shows the table.
#[test]
#[ignore = "needs a CUDA device"]
fn each_backend_of_attention_is_tried_and_the_plain_one_is_sound() {
    let trial =
        Trial { program: env!("CARGO_BIN_EXE_fm-dist").into(), cache: None, ..Trial::on_gpu(0) };
    let tried = trial.run(&standard_cases()).unwrap().tried;
    println!("{:?}\n{}", trial.machine, table(&tried));
    let sound = |backend| {
        let own = tried.iter().filter(move |tried| tried.backend == backend);
        own.filter(|tried| tried.outcome.is_sound()).count()
    };
    assert_eq!(sound(AttentionBackend::Plain), standard_cases().len());
    assert!(sound(AttentionBackend::Flash) + sound(AttentionBackend::Efficient) > 0);
    // Each backend computes where it alone is permitted beside the plain one.
    open_libtorch().unwrap();
    open_on(Device::Cuda(0));
    let draw = || Tensor::randn([1, 128, 2, 64], (Kind::BFloat16, Device::Cuda(0)));
    let tensor = Key::new(1, Purpose::Test).seeded(draw);
    let attention = Attention { query: &tensor, key: &tensor, value: &tensor, mask: None };
    for backend in AttentionBackend::ALL {
        assert_eq!(attention.taken_by(backend), Some(backend));
    }
}

/// The second start finds what the first one tried, if the driver names the GPU.
#[test]
#[ignore = "needs a CUDA device"]
fn a_run_tries_its_own_attention_once_and_computes_by_what_is_sound() {
    let root = TempDir::new().unwrap();
    let [dtype, device] = ["model.dtype=bfloat16", "parallel.device=\"cuda\""];
    let started = |name: &str| {
        let output = format!("output_dir={}", root.path().join(name).display());
        let mut command = program(&with_sets(&["train"], &["max_steps=3", dtype, device, &output]));
        command.env("XDG_CACHE_HOME", root.path());
        let (code, _, told) = finish(command);
        assert_eq!(code, 0, "{told}");
        let lines = told.lines().filter_map(|line| line.split_once("attention "));
        let lines: Vec<String> = lines.map(|(_, rest)| rest.to_string()).collect();
        println!("{}", lines.join("\n"));
        assert!(lines.iter().any(|line| line.starts_with("without a mask: ")), "{told}");
        lines
    };
    let (first, second) = (started("first"), started("second"));
    let kept = fs::read_dir(root.path().join("fm-dist/attention")).map_or(0, Iterator::count);
    assert_eq!(kept > 0, Machine::here().key().is_some());
    // Times of another trial would be others.
    assert_eq!(kept > 0, first == second);
}
