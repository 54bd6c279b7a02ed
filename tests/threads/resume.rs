//! A resumed run is the unbroken run: same bits, no step twice, no step missing; and what cannot be
//! resumed is refused.

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::config::RunConfig;
use fm_dist::optim::lr::LrScheduleChoice;
use fm_dist::run::Resume;
use fm_dist::settings::Family;
use tempfile::TempDir;

use crate::runs::{checkpoint, column, tiny, train_in_threads};

/// Ten steps with a checkpoint after every fifth.
pub const TEN_STEPS: [&str; 2] = ["max_steps=10", "checkpoint.every_n_steps=5"];

pub fn config(folder: &Path, overrides: &[&str]) -> RunConfig {
    let output = format!("output_dir={}", folder.display());
    tiny(&[TEN_STEPS.as_slice(), &[output.as_str()], overrides].concat())
}

/// A run whose checkpoint of step 10 is gone, as if it had died after step 5.
pub fn broken_off(root: &Path, name: &str, ranks: usize) -> PathBuf {
    let run = train_in_threads(&config(&root.join(name), &[]), &Resume::Never, ranks).unwrap();
    fs::remove_dir_all(run.join("step-00000010")).unwrap();
    run
}

#[test]
fn a_checkpoint_loads_at_any_number_of_ranks() {
    let root = TempDir::new().unwrap();
    let reference =
        train_in_threads(&config(&root.path().join("reference"), &[]), &Resume::Never, 1).unwrap();
    for (saved, resumed) in [(1, 4), (2, 1), (4, 2)] {
        let run = broken_off(root.path(), &format!("from-{saved}"), saved);
        train_in_threads(&config(&run, &[]), &Resume::Latest, resumed).unwrap();
        let (a, b) = (column(&reference, "loss"), column(&run, "loss"));
        assert_eq!(b.len(), 10);
        for (a, b) in a.iter().zip(&b) {
            // The order of summation differs between numbers of ranks.
            assert!(
                (a.1 - b.1).abs() < 2e-4,
                "{saved} to {resumed} ranks at step {}: {} and {}",
                a.0,
                a.1,
                b.1
            );
        }
    }
}

#[test]
fn saving_what_was_loaded_gives_the_same_bytes() {
    let root = TempDir::new().unwrap();
    let first =
        train_in_threads(&config(&root.path().join("first"), &["max_steps=5"]), &Resume::Never, 2)
            .unwrap();
    let before = checkpoint(&first, 5);
    // A run that is already at its last step saves nothing, so the same state is saved by a run
    // that has one step to go.
    let again =
        train_in_threads(&config(&root.path().join("again"), &["max_steps=5"]), &Resume::Never, 1)
            .unwrap();
    assert_eq!(before.keys().collect::<Vec<_>>(), checkpoint(&again, 5).keys().collect::<Vec<_>>());
    let config = config(&first, &["max_steps=5"]);
    train_in_threads(&config, &Resume::Latest, 2).unwrap();
    assert_eq!(before, checkpoint(&first, 5));
}

#[test]
fn a_corrupt_newest_checkpoint_is_set_aside_and_the_one_before_is_used() {
    let root = TempDir::new().unwrap();
    let unbroken =
        train_in_threads(&config(&root.path().join("unbroken"), &[]), &Resume::Never, 1).unwrap();
    let run =
        train_in_threads(&config(&root.path().join("corrupt"), &[]), &Resume::Never, 1).unwrap();
    let part = run.join("step-00000010/model-00001-of-00001.safetensors");
    let mut bytes = fs::read(&part).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&part, bytes).unwrap();
    train_in_threads(&config(&run, &[]), &Resume::Latest, 1).unwrap();
    let log = fs::read_to_string(run.join("log/rank-00000.jsonl")).unwrap();
    let warning = "step-00000010 failed its check (model-00001-of-00001.safetensors: sha256 differs); using step-00000005; \
                   5 steps will be redone; bad one kept as step-00000010.bad-1";
    assert_eq!(
        log.lines().filter(|line| line.contains("WARN") && line.contains(warning)).count(),
        1,
        "{log}"
    );
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
    assert!(
        refused(&["train.global_batch_size=64"])
            .contains("global batch is 64, the checkpoint's was 32")
    );
    let text = refused(&["model.dit.depth=3", "model.dit.width=64"]);
    let expected = "model.dit.depth is 3, the checkpoint's was 2, model.dit.width is 64, the checkpoint's was 32: another model";
    assert!(text.contains(expected), "{text}");
}

/// Lines of rank 0's log that contain a text.
pub fn said(run: &Path, text: &str) -> Vec<String> {
    let log = fs::read_to_string(run.join("log/rank-00000.jsonl")).unwrap();
    log.lines().filter(|line| line.contains(text)).map(ToString::to_string).collect()
}

#[test]
fn another_model_of_equal_shapes_is_refused_whatever_config_toml_says() {
    let root = TempDir::new().unwrap();
    let run = broken_off(root.path(), "run", 1);
    let text = fs::read_to_string(run.join("config.toml")).unwrap();
    fs::write(run.join("config.toml"), text.replace("num_heads = 4", "num_heads = 2")).unwrap();
    for resume in
        [Resume::Latest, Resume::From(run.clone()), Resume::From(run.join("step-00000005"))]
    {
        let error =
            train_in_threads(&config(&run, &["model.dit.num_heads=2"]), &resume, 2).unwrap_err();
        assert_eq!(error.exit_code(), 51, "{error}");
        assert!(
            error
                .to_string()
                .contains("model.dit.num_heads is 2, the checkpoint's was 4: another model"),
            "{error}"
        );
    }
}

#[test]
fn what_a_resume_changes_is_listed_and_the_configuration_before_is_kept() {
    let root = TempDir::new().unwrap();
    let run = broken_off(root.path(), "run", 1);
    let before = fs::read_to_string(run.join("config.toml")).unwrap();
    train_in_threads(&config(&run, &[]), &Resume::Latest, 1).unwrap();
    assert!(
        said(&run, "configuration changed").is_empty() && said(&run, "jumps").is_empty(),
        "nothing changed"
    );
    assert!(
        !run.join("config-1.toml").exists()
            && fs::read_to_string(run.join("config.toml")).unwrap() == before
    );
    let changes = [
        "max_steps=12",
        "optimizer.adamw.beta1=0.8",
        "parallel.seed_scope=rank",
        "model.dtype=bfloat16",
        "checkpoint.keep_every=3",
    ];
    train_in_threads(&config(&run, &changes), &Resume::Latest, 2).unwrap();
    let expected = "configuration changed since step 10: checkpoint.keep_every: was unset, is 3; max_steps: was 10, is 12; \
                    model.dtype: was \\\"float32\\\", is \\\"bfloat16\\\"; optimizer.adamw.beta1: was 0.9, is 0.8; \
                    parallel.seed_scope: was \\\"sample\\\", is \\\"rank\\\"; the configuration before is config-1.toml";
    let found = said(&run, "configuration changed");
    assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    assert_eq!(fs::read_to_string(run.join("config-1.toml")).unwrap(), before);
    train_in_threads(&config(&run, &["max_steps=14"]), &Resume::Latest, 1).unwrap();
    assert!(
        run.join("config-2.toml").exists()
            && fs::read_to_string(run.join("config-1.toml")).unwrap() == before
    );
}

#[test]
fn a_learning_rate_that_leaps_at_a_resume_is_told_with_both_numbers() {
    let root = TempDir::new().unwrap();
    for schedule in ["cosine", "linear", "rex", "wsd"] {
        let scheduled = |steps: &str| {
            let lr_scheduler = LrScheduleChoice::named(schedule).unwrap();
            RunConfig { lr_scheduler, ..config(&root.path().join(schedule), &[steps]) }
        };
        let run = train_in_threads(&scheduled("max_steps=8"), &Resume::Never, 1).unwrap();
        train_in_threads(&scheduled("max_steps=16"), &Resume::Latest, 1).unwrap();
        let found = said(&run, "the learning rate jumps: step 8 had 0, step 9 has ");
        assert!(found.len() == 1 && found[0].contains("WARN"), "{schedule}: {found:?}");
        let lr = column(&run, "lr")[8].1;
        let shown: f64 = found[0]
            .split("step 9 has ")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        // Five digits are shown.
        assert!((shown - lr).abs() <= 1e-4 * lr, "{schedule}: {shown} is told, {lr} was used");
    }
}

#[test]
fn the_newest_run_goes_on_also_behind_a_gap_and_with_the_configuration_of_no_other() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("run");
    let start = |resume: &Resume, overrides: &[&str]| {
        train_in_threads(&config(&output, overrides), resume, 1)
    };
    let runs: Vec<PathBuf> =
        (0..3).map(|_| start(&Resume::Never, &["max_steps=2"]).unwrap()).collect();
    fs::remove_dir_all(&runs[1]).unwrap();
    for resume in [Resume::Latest, Resume::Auto] {
        let steps = if resume == Resume::Latest { "max_steps=3" } else { "max_steps=4" };
        assert_eq!(start(&resume, &[steps]).unwrap(), runs[2]);
    }
    // A newer one that died before its first checkpoint.
    let newer = start(&Resume::Never, &["max_steps=1"]).unwrap();
    assert_eq!(newer, root.path().join("run-4"));
    fs::remove_dir_all(newer.join("step-00000001")).unwrap();
    let before = fs::read_to_string(runs[2].join("config.toml")).unwrap();
    assert_eq!(
        start(&Resume::Latest, &["max_steps=4", "optimizer.adamw.lr=0.5"]).unwrap(),
        runs[2]
    );
    assert_eq!(
        said(
            &runs[2],
            &format!("{} is passed over: it ended before its first checkpoint", newer.display())
        )
        .len(),
        1
    );
    assert_eq!(said(&runs[2], "nothing to do: step 4 of 4 is done").len(), 1);
    assert_eq!(start(&Resume::Latest, &["max_steps=2"]).unwrap(), runs[2]);
    assert_eq!(said(&runs[2], "nothing to do: step 4 of 2 is done").len(), 1);
    assert_eq!(
        fs::read_to_string(runs[2].join("config.toml")).unwrap(),
        before,
        "nothing is done, nothing is written"
    );
    fs::remove_file(runs[2].join("report.html")).unwrap();
    start(&Resume::Latest, &["max_steps=4"]).unwrap();
    assert!(
        runs[2].join("report.html").exists(),
        "a run that ended before its report has that to do"
    );
}

#[test]
fn a_folder_that_is_named_goes_on_with_its_own_output_dir() {
    let root = TempDir::new().unwrap();
    let run =
        train_in_threads(&config(&root.path().join("run"), &["max_steps=2"]), &Resume::Never, 1)
            .unwrap();
    let other = root.path().join("other");
    let goes_on = |resume: Resume, steps: &str| {
        train_in_threads(&config(&other, &[steps]), &resume, 2).unwrap()
    };
    assert_eq!(goes_on(Resume::From(run.clone()), "max_steps=3"), run);
    let unused = "as --resume says; output_dir = ";
    assert_eq!(said(&run, unused).len(), 1);
    let kept = format!("output_dir = \"{}\"", run.display());
    assert!(fs::read_to_string(run.join("config.toml")).unwrap().contains(&kept), "the run's own");
    std::os::unix::fs::symlink(run.join("step-00000003"), root.path().join("best")).unwrap();
    assert_eq!(
        goes_on(Resume::From(root.path().join("best")), "max_steps=4"),
        run.canonicalize().unwrap()
    );
    assert!(!other.exists(), "and nothing is made where nothing goes");
}

#[test]
fn starts_that_fail_leave_one_folder_and_the_run_that_trains_has_it() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("run");
    for weights in
        ["model.path=/nowhere", "flow_matching.apply_loss_mask=true"].into_iter().cycle().take(4)
    {
        train_in_threads(&config(&output, &[weights]), &Resume::Never, 1).unwrap_err();
    }
    assert_eq!(
        train_in_threads(&config(&output, &["max_steps=1"]), &Resume::Never, 1).unwrap(),
        output
    );
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    let file = root.path().join("file");
    fs::write(&file, "mine").unwrap();
    for resume in [Resume::Never, Resume::Latest, Resume::Auto] {
        let error = train_in_threads(&config(&file, &[]), &resume, 2).unwrap_err();
        assert!(
            error.exit_code() == 50
                && error.to_string().contains("output_dir: ")
                && error.to_string().contains("is no folder"),
            "{error}"
        );
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
}

#[test]
fn d17_an_old_checkpoint_is_not_resumed_over_newer_ones() {
    let root = TempDir::new().unwrap();
    let run = train_in_threads(&config(&root.path().join("run"), &[]), &Resume::Never, 1).unwrap();
    let error = train_in_threads(&config(&run, &[]), &Resume::From(run.join("step-00000005")), 1)
        .unwrap_err();
    assert!(error.to_string().contains("newer checkpoints stand in the same run"), "{error}");
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let root = TempDir::new().unwrap();
    let run = train_in_threads(
        &config(
            &root.path().join("run"),
            &["checkpoint.every_n_steps=2", "checkpoint.keep_last=3"],
        ),
        &Resume::Never,
        2,
    )
    .unwrap();
    let mut steps: Vec<String> = fs::read_dir(&run)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    steps.retain(|name| name.contains("step-"));
    steps.sort();
    assert_eq!(steps, ["step-00000006", "step-00000008", "step-00000010"]);
}

#[test]
fn without_a_save_of_the_last_step_a_resume_does_the_steps_behind_the_last_checkpoint_again() {
    let root = TempDir::new().unwrap();
    let steps =
        |run: &Path| column(run, "loss").iter().map(|point| point.0 as u64).collect::<Vec<_>>();
    let seldom = ["checkpoint.save_last=false", "max_steps=7"];
    let run =
        train_in_threads(&config(&root.path().join("seldom"), &seldom), &Resume::Never, 2).unwrap();
    assert!(run.join("step-00000005").exists() && !run.join("step-00000007").exists());
    assert!(run.join("report.html").exists(), "a report needs no checkpoint");
    assert_eq!(train_in_threads(&config(&run, &seldom), &Resume::Latest, 2).unwrap(), run);
    assert_eq!(steps(&run), (1..=7).collect::<Vec<_>>());
    // A multiple of every_n_steps is saved though it is the last step.
    let run =
        train_in_threads(&config(&root.path().join("multiple"), &seldom[..1]), &Resume::Never, 1)
            .unwrap();
    assert!(run.join("step-00000010").exists());
    let never = ["checkpoint.save_last=false", "max_steps=3"];
    let run =
        train_in_threads(&config(&root.path().join("never"), &never), &Resume::Never, 1).unwrap();
    assert_eq!(steps(&run), [1, 2, 3]);
    let error = train_in_threads(&config(&run, &never), &Resume::Latest, 1).unwrap_err();
    assert_eq!(error.exit_code(), 44, "{error}");
}
