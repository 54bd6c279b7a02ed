//! Single passes and libtorch's operators train alike, and a run's log tells which it took.

use std::path::Path;

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
