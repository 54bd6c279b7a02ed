//! Single passes and libtorch's operators train alike, and a run's log tells which it took.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use fm_dist::files::safetensors;
use fm_dist::ops::drawn;
use tch::Kind;
use tempfile::TempDir;

use crate::runs::{column, finish, program, with_sets};

/// Roundings of float32 grown over three steps of training.
const ROUNDINGS: f64 = 1e-4;

/// What standard error says of a run of three steps with further overrides.
fn log(run: &Path, overrides: &[&str]) -> String {
    let output = format!("output_dir={}", run.display());
    let all = [&["max_steps=3", "log.progress=\"never\"", &output], overrides].concat();
    let (code, _, errors) = finish(program(&with_sets(&["train"], &all)));
    assert_eq!(code, 0, "{errors}");
    errors
}

#[test]
fn single_passes_and_libtorchs_operators_train_alike_and_the_log_tells_which() {
    let root = TempDir::new().unwrap();
    let (fused, plain) = (root.path().join("fused"), root.path().join("plain"));
    let text = log(&fused, &[]);
    assert!(text.contains("operations in a single pass over memory each"), "{text}");
    assert!(text.contains(" operations, each in a single pass"), "{text}");
    let text = log(&plain, &["compute.kernels=plain"]);
    assert!(
        text.contains("operations by libtorch's operators: compute.kernels = \"plain\""),
        "{text}"
    );
    assert!(!text.contains("single pass"), "{text}");
    let (fused, plain) = (column(&fused, "loss"), column(&plain, "loss"));
    assert_eq!(fused.len(), 3);
    for ((step, fused), (_, plain)) in fused.iter().zip(&plain) {
        assert!((fused - plain).abs() <= ROUNDINGS * plain, "step {step}: {fused} and {plain}");
    }
}

#[test]
fn more_threads_than_one_take_libtorchs_operators_and_the_log_tells_why() {
    let root = TempDir::new().unwrap();
    let text = log(&root.path().join("run"), &["parallel.num_threads=2"]);
    let why =
        "operations by libtorch's operators: they divide their work among parallel.num_threads = 2";
    assert!(text.contains(why), "{text}");
}

#[test]
fn operations_that_fell_back_are_counted_with_their_reason() {
    let root = TempDir::new().unwrap();
    // 24 is no multiple of a vector's 16 numbers.
    let text = log(&root.path().join("run"), &["model.dit.width=24", "model.dit.num_heads=2"]);
    let line = text.lines().find(|line| line.contains(" fell back to libtorch's operators: "));
    let line = line.unwrap_or_else(|| panic!("{text}"));
    for name in ["gated_residual ", "modulated_norm "] {
        assert!(line.contains(name), "{line}");
    }
    assert!(line.contains("(a shape that its single pass does not know)"), "{line}");
    assert!(!line.contains("gelu_tanh"), "{line}");
}

#[test]
fn a_resume_with_other_operations_is_told() {
    let root = TempDir::new().unwrap();
    let run = root.path().join("run");
    log(&run, &[]);
    let output = format!("output_dir={}", run.display());
    let all = ["max_steps=4", "compute.kernels=plain", &output];
    let arguments = with_sets(&["train", "--resume", "latest"], &all);
    let (code, _, errors) = finish(program(&arguments));
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("compute.kernels: was \"fused\", is \"plain\""), "{errors}");
}

#[test]
fn a_step_counts_its_operators_of_which_single_passes_leave_fewer() {
    let root = TempDir::new().unwrap();
    let [batch, dump] = ["batch", "dump"].map(|name| root.path().join(name).display().to_string());
    // As the digits are.
    let tensors = [
        ("image_latents", &drawn(&[4, 1, 8, 8], Kind::Float, 1)),
        ("text_embeddings", &drawn(&[4, 1, 10], Kind::Float, 2)),
    ];
    let metadata = BTreeMap::from([("data_type".to_string(), "image".to_string())]);
    safetensors::write(&mut File::create(&batch).unwrap(), &tensors, &metadata).unwrap();
    let step = ["step", "--batch", &batch, "--dump", &dump, "--grads", "--operators"];
    let told = |kernels: &str| {
        let (code, output, errors) = finish(program(&with_sets(&step, &[kernels])));
        assert_eq!(code, 0, "{errors}");
        let number = |before: &str, behind: &str| {
            let (head, _) = output.split_once(behind).unwrap_or_else(|| panic!("{output}"));
            let (_, number) = head.rsplit_once(before).unwrap_or(("", head));
            number.parse::<f64>().unwrap_or_else(|_| panic!("{number} in {output}"))
        };
        let [theirs, ours, left, moved, by_ours] = [
            number("\n", " operators of libtorch that compute or move numbers, "),
            number("numbers, ", " single passes of our own\n"),
            number("attention: ", " operators that move "),
            number("that move ", " MB, passes that move "),
            number("passes that move ", " MB\n   times"),
        ];
        assert!(left < theirs, "{output}");
        (Told { theirs, ours, moved, by_ours }, output)
    };
    let (fused, output) = told("compute.kernels=fused");
    assert!(output.contains(" operations, each in a single pass\n"), "{output}");
    assert!(output.lines().any(|line| line.trim_start().ends_with(" mm")), "{output}");
    assert!(output.contains(" modulated_norm, our own\n"), "{output}");
    let (plain, output) = told("compute.kernels=plain");
    assert!(!output.contains("our own\n   times"), "{output}");
    // Forward and backward; each is a chain without.
    assert!(fused.ours > 20.0 && plain.ours == 0.0, "{fused:?} and {plain:?}");
    assert!(fused.theirs + fused.ours + 30.0 < plain.theirs, "{fused:?} and {plain:?}");
    assert!(fused.by_ours > 0.0 && plain.by_ours == 0.0);
    assert!(1.2 * (fused.moved + fused.by_ours) < plain.moved, "{fused:?} and {plain:?}");
}

/// What a step tells of its operators: times of libtorch's and of passes of our own, and what they
/// move beside products and attention, in MB.
#[derive(Debug)]
struct Told {
    theirs: f64,
    ours: f64,
    moved: f64,
    by_ours: f64,
}
