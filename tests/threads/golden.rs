//! Known loss curves, as text. A change that should not change numbers leaves them alone.

use std::fs;
use std::path::Path;

use fm_dist::run::Resume;
use tempfile::TempDir;

use crate::runs::{column, tiny, train_in_threads};

/// Other processors have other kernels: their rounding, grown over thirty steps of training.
const OTHER_KERNELS: f64 = 2e-3;

#[test]
fn the_digits_run_has_its_known_loss_curve() {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={}", root.path().join("run").display());
    let run = train_in_threads(&tiny(&["max_steps=30", &output]), &Resume::Never, 2).unwrap();
    let losses = column(&run, "loss");
    let text: String = losses.iter().map(|(step, loss)| format!("{step} {loss:.6}\n")).collect();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/digits-tiny.txt");
    let known = fs::read_to_string(&golden).unwrap_or_default();
    let known: Vec<f64> =
        known.lines().map(|line| line.split_once(' ').unwrap().1.parse().unwrap()).collect();
    assert_eq!(
        known.len(),
        losses.len(),
        "{} is not the curve of this run:\n{text}",
        golden.display()
    );
    for ((step, loss), known) in losses.iter().zip(known) {
        assert!(
            (loss - known).abs() <= OTHER_KERNELS * known,
            "step {step}: loss {loss}, known {known}; the whole curve:\n{text}"
        );
    }
}
