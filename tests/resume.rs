//! A resumed run is the unbroken run: same bits, no step twice, no step missing; and what cannot be resumed is refused.

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::config::RunConfig;
use fm_dist::train::Resume;
use tempfile::TempDir;

use crate::runs::{checkpoint, column, finish, kill_at, mpirun, program, tiny, train_in_threads, with_sets};

/// Ten steps with a checkpoint after every fifth.
const TEN_STEPS: [&str; 2] = ["max_steps=10", "checkpoint.every_n_steps=5"];

fn config(folder: &Path, overrides: &[&str]) -> RunConfig {
    let output = format!("output_dir={}", folder.display());
    tiny(&[TEN_STEPS.as_slice(), &[output.as_str()], overrides].concat())
}

/// A run whose checkpoint of step 10 is gone, as if it had died after step 5.
fn broken_off(root: &Path, name: &str, ranks: usize) -> PathBuf {
    let run = train_in_threads(&config(&root.join(name), &[]), &Resume::Never, ranks).unwrap();
    fs::remove_dir_all(run.join("step-00000010")).unwrap();
    run
}

#[test]
fn five_steps_a_kill_and_five_more_are_ten_steps() {
    let root = TempDir::new().unwrap();
    let unbroken = root.path().join("unbroken");
    let killed = root.path().join("killed");
    let start = |folder: &Path| format!("output_dir={}", folder.display());
    let (to_unbroken, to_killed) = (start(&unbroken), start(&killed));
    let arguments = |output: &'static str| with_sets(&["train"], &[TEN_STEPS[0], TEN_STEPS[1], output]);
    let (code, _, errors) = finish(mpirun(2, &arguments(to_unbroken.leak())));
    assert_eq!(code, 0, "{errors}");
    let output: &'static str = to_killed.leak();
    kill_at(mpirun(2, &arguments(output)), "step-00000005", output);
    let mut resumed = arguments(output);
    resumed.extend(["--resume", "latest"]);
    let (code, _, errors) = finish(mpirun(2, &resumed));
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("resumed from"), "{errors}");
    assert_eq!(checkpoint(&unbroken, 10), checkpoint(&killed, 10));
    for name in ["loss", "grad_norm", "lr", "sigma_mean", "samples_seen"] {
        let steps = column(&killed, name);
        assert_eq!(steps.iter().map(|point| point.0 as u64).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>(), "no gap and no double");
        assert_eq!(steps, column(&unbroken, name), "{name}");
    }
}

#[test]
fn a_checkpoint_loads_at_any_number_of_ranks() {
    let root = TempDir::new().unwrap();
    let reference = train_in_threads(&config(&root.path().join("reference"), &[]), &Resume::Never, 1).unwrap();
    for (saved, resumed) in [(1, 4), (2, 1), (4, 2)] {
        let run = broken_off(root.path(), &format!("from-{saved}"), saved);
        train_in_threads(&config(&run, &[]), &Resume::Latest, resumed).unwrap();
        let (a, b) = (column(&reference, "loss"), column(&run, "loss"));
        assert_eq!(b.len(), 10);
        for (a, b) in a.iter().zip(&b) {
            // The order of summation differs between numbers of ranks.
            assert!((a.1 - b.1).abs() < 2e-4, "{saved} to {resumed} ranks at step {}: {} and {}", a.0, a.1, b.1);
        }
    }
}

#[test]
fn saving_what_was_loaded_gives_the_same_bytes() {
    let root = TempDir::new().unwrap();
    let first = train_in_threads(&config(&root.path().join("first"), &["max_steps=5"]), &Resume::Never, 2).unwrap();
    let before = checkpoint(&first, 5);
    // A run that is already at its last step saves nothing, so the same state is saved by a run that has one step to go.
    let again = train_in_threads(&config(&root.path().join("again"), &["max_steps=5"]), &Resume::Never, 1).unwrap();
    assert_eq!(before.keys().collect::<Vec<_>>(), checkpoint(&again, 5).keys().collect::<Vec<_>>());
    let config = config(&first, &["max_steps=5"]);
    train_in_threads(&config, &Resume::Latest, 2).unwrap();
    assert_eq!(before, checkpoint(&first, 5));
}

#[test]
fn a_corrupt_newest_checkpoint_is_set_aside_and_the_one_before_is_used() {
    let root = TempDir::new().unwrap();
    let unbroken = train_in_threads(&config(&root.path().join("unbroken"), &[]), &Resume::Never, 1).unwrap();
    let run = train_in_threads(&config(&root.path().join("corrupt"), &[]), &Resume::Never, 1).unwrap();
    let part = run.join("step-00000010/model-00001-of-00001.safetensors");
    let mut bytes = fs::read(&part).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&part, bytes).unwrap();
    train_in_threads(&config(&run, &[]), &Resume::Latest, 1).unwrap();
    let log = fs::read_to_string(run.join("log/rank-00000.jsonl")).unwrap();
    let warning = "step-00000010 failed its check (model-00001-of-00001.safetensors: sha256 differs); using step-00000005; \
                   5 steps will be redone; bad one kept as step-00000010.bad-1";
    assert_eq!(log.lines().filter(|line| line.contains("WARN") && line.contains(warning)).count(), 1, "{log}");
    assert!(run.join("step-00000010.bad-1").is_dir());
    assert_eq!(checkpoint(&run, 10), checkpoint(&unbroken, 10));
}

#[test]
fn a_resume_without_any_usable_checkpoint_never_starts_anew() {
    let root = TempDir::new().unwrap();
    let run = broken_off(root.path(), "run", 1);
    fs::write(run.join("step-00000005/manifest.json"), "{").unwrap();
    let error = train_in_threads(&config(&run, &[]), &Resume::Latest, 2).unwrap_err();
    assert_eq!(error.exit_code(), 44, "{error}");
    assert!(error.to_string().contains("none of its 1 checkpoints verifies"), "{error}");
}

#[test]
fn d9_d10_another_seed_batch_or_model_is_refused_by_name_with_code_51() {
    let root = TempDir::new().unwrap();
    let run = broken_off(root.path(), "run", 1);
    let refused = |overrides: &[&str]| {
        let error = train_in_threads(&config(&run, overrides), &Resume::Latest, 1).unwrap_err();
        assert_eq!(error.exit_code(), 51, "{error}");
        error.to_string()
    };
    assert!(refused(&["seed=7"]).contains("seed is 7, the checkpoint's was 42"));
    let output = format!("output_dir={}", run.display());
    let mut arguments = with_sets(&["train"], &[TEN_STEPS[0], TEN_STEPS[1], &output, "seed=7"]);
    arguments.extend(["--resume", "latest"]);
    let (code, _, errors) = finish(mpirun(2, &arguments));
    assert_eq!(
        (code, errors.matches("fm-dist: error CKPT_MISMATCH rank 0/2").count(), errors.matches("fm-dist: error").count()),
        (51, 1, 1),
        "{errors}"
    );
    assert!(refused(&["train.global_batch_size=64"]).contains("global batch is 64, the checkpoint's was 32"));
    let text = refused(&["model.dit.depth=3"]);
    assert!(text.contains("missing: blocks.2.adaLN_modulation.1.bias") && text.contains("and "), "{text}");
    assert!(refused(&["model.dit.width=64"]).contains("of another shape or kind: blocks.0.adaLN_modulation.1.bias is Float [192]"));
}

#[test]
fn d17_an_old_checkpoint_is_not_resumed_over_newer_ones() {
    let root = TempDir::new().unwrap();
    let run = train_in_threads(&config(&root.path().join("run"), &[]), &Resume::Never, 1).unwrap();
    let error = train_in_threads(&config(&run, &[]), &Resume::From(run.join("step-00000005")), 1).unwrap_err();
    assert!(error.to_string().contains("newer checkpoints stand in the same run"), "{error}");
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let root = TempDir::new().unwrap();
    let run =
        train_in_threads(&config(&root.path().join("run"), &["checkpoint.every_n_steps=2", "checkpoint.keep_last=3"]), &Resume::Never, 2)
            .unwrap();
    let mut steps: Vec<String> = fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    steps.retain(|name| name.contains("step-"));
    steps.sort();
    assert_eq!(steps, ["step-00000006", "step-00000008", "step-00000010"]);
}

#[test]
fn a_second_run_leaves_the_first_alone() {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={}", root.path().join("run").display());
    let arguments = with_sets(&["train"], &["max_steps=1", &output]);
    assert_eq!(finish(program(&arguments)).0, 0);
    let first = checkpoint(&root.path().join("run"), 1);
    assert_eq!(finish(program(&arguments)).0, 0);
    assert_eq!(checkpoint(&root.path().join("run"), 1), first);
    assert_eq!(checkpoint(&root.path().join("run-2"), 1), first);
}

#[test]
fn without_a_save_of_the_last_step_a_resume_does_the_steps_behind_the_last_checkpoint_again() {
    let root = TempDir::new().unwrap();
    let steps = |run: &Path| column(run, "loss").iter().map(|point| point.0 as u64).collect::<Vec<_>>();
    let seldom = ["checkpoint.save_last=false", "max_steps=7"];
    let run = train_in_threads(&config(&root.path().join("seldom"), &seldom), &Resume::Never, 2).unwrap();
    assert!(run.join("step-00000005").exists() && !run.join("step-00000007").exists());
    assert!(run.join("report.html").exists(), "a report needs no checkpoint");
    assert_eq!(train_in_threads(&config(&run, &seldom), &Resume::Latest, 2).unwrap(), run);
    assert_eq!(steps(&run), (1..=7).collect::<Vec<_>>());
    // A multiple of every_n_steps is saved though it is the last step.
    let run = train_in_threads(&config(&root.path().join("multiple"), &seldom[..1]), &Resume::Never, 1).unwrap();
    assert!(run.join("step-00000010").exists());
    let never = ["checkpoint.save_last=false", "max_steps=3"];
    let run = train_in_threads(&config(&root.path().join("never"), &never), &Resume::Never, 1).unwrap();
    assert_eq!(steps(&run), [1, 2, 3]);
    let error = train_in_threads(&config(&run, &never), &Resume::Latest, 1).unwrap_err();
    assert_eq!(error.exit_code(), 44, "{error}");
}
