//! The program resumes a run as it was, killed or not, and refuses what it cannot resume.

use std::fs;
use std::path::Path;

use fm_dist::run::Resume;
use tempfile::TempDir;

use crate::runs::{
    checkpoint, column, finish, kill_at, mpirun, program, train_in_threads, with_sets,
};
use crate::threads::resume::{TEN_STEPS, broken_off, config};

#[test]
fn five_steps_a_kill_and_five_more_are_ten_steps() {
    let root = TempDir::new().unwrap();
    let unbroken = root.path().join("unbroken");
    let killed = root.path().join("killed");
    let start = |folder: &Path| format!("output_dir={}", folder.display());
    let (to_unbroken, to_killed) = (start(&unbroken), start(&killed));
    let arguments =
        |output: &'static str| with_sets(&["train"], &[TEN_STEPS[0], TEN_STEPS[1], output]);
    let (code, _, errors) = finish(mpirun(2, &arguments(to_unbroken.leak())));
    assert_eq!(code, 0, "{errors}");
    let output: &'static str = to_killed.leak();
    // However busy the machine is: step 5 is saved before step 6 begins, which waits to be killed.
    let mut waiting = arguments(output);
    waiting.extend([
        "--set",
        "checkpoint.asynchronous=false",
        "--set",
        "debug.inject_fault=\"sleep@0:6:forward:60\"",
    ]);
    kill_at(mpirun(2, &waiting), "step-00000005", output);
    let mut resumed = arguments(output);
    resumed.extend(["--resume", "latest"]);
    let (code, _, errors) = finish(mpirun(2, &resumed));
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("resumed from"), "{errors}");
    assert_eq!(checkpoint(&unbroken, 10), checkpoint(&killed, 10));
    for name in ["loss", "grad_norm", "lr", "sigma_mean", "samples_seen"] {
        let steps = column(&killed, name);
        assert_eq!(
            steps.iter().map(|point| point.0 as u64).collect::<Vec<_>>(),
            (1..=10).collect::<Vec<_>>(),
            "no gap and no double"
        );
        assert_eq!(steps, column(&unbroken, name), "{name}");
    }
}

#[test]
fn d9_another_seed_is_refused_once_by_all_ranks_with_code_51() {
    let root = TempDir::new().unwrap();
    let run = broken_off(root.path(), "run", 1);
    let output = format!("output_dir={}", run.display());
    let mut arguments = with_sets(&["train"], &[TEN_STEPS[0], TEN_STEPS[1], &output, "seed=7"]);
    arguments.extend(["--resume", "latest"]);
    let (code, _, errors) = finish(mpirun(2, &arguments));
    assert_eq!(
        (
            code,
            errors.matches("fm-dist: error CKPT_MISMATCH rank 0/2").count(),
            errors.matches("fm-dist: error").count()
        ),
        (51, 1, 1),
        "{errors}"
    );
}

#[test]
fn another_model_is_neither_exported_nor_sampled_whatever_config_toml_says() {
    let root = TempDir::new().unwrap();
    let run = broken_off(root.path(), "run", 1);
    let text = fs::read_to_string(run.join("config.toml")).unwrap();
    fs::write(run.join("config.toml"), text.replace("num_heads = 4", "num_heads = 2")).unwrap();
    let (code, _, errors) = finish(program(&[
        "export",
        "--run",
        run.to_str().unwrap(),
        "--out",
        root.path().join("x").to_str().unwrap(),
    ]));
    assert!(code == 50 && errors.contains("has no class"), "{errors}");
    let out = root.path().join("x.safetensors");
    let (code, _, errors) = finish(program(&[
        "sample",
        "--run",
        run.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ]));
    assert!(
        code == 51 && errors.contains("model.dit.num_heads is 2, the checkpoint's was 4"),
        "{errors}"
    );
}

/// `.` in a checkpoint's folder means the run above it.
#[test]
fn a_checkpoint_that_is_the_current_folder_goes_on_in_its_run() {
    let root = TempDir::new().unwrap();
    let run =
        train_in_threads(&config(&root.path().join("run"), &["max_steps=3"]), &Resume::Never, 1)
            .unwrap();
    let step = run.join("step-00000003");
    let mut command = program(&with_sets(&["train"], &[TEN_STEPS[1], "max_steps=4"]));
    command.args(["--resume", "."]).current_dir(&step);
    let (code, _, errors) = finish(command);
    assert_eq!(code, 0, "{errors}");
    assert!(run.join("step-00000004").is_dir() && !step.join("config.toml").exists(), "{errors}");
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
