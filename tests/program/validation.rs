//! A validation as a user meets it: planned by `check`, told in the log and drawn in the report. A
//! kill amid it costs nothing.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use crate::runs::{checkpoint, column, finish, kill_at, mpirun, program, with_sets};
use crate::threads::validation::{best, validations};

const JUDGED: [&str; 7] = [
    "max_steps=9",
    "checkpoint.every_n_steps=4",
    "checkpoint.keep_last=1",
    "validation.share=0.1",
    "validation.every_n_steps=3",
    "validation.sigmas=[0.1, 0.5, 0.9]",
    "validation.max_samples=40",
];

#[test]
fn a_run_that_is_killed_while_samples_are_judged_goes_on_as_the_unbroken_one() {
    let root = TempDir::new().unwrap();
    let run = |name: &str| root.path().join(name);
    let output =
        |name: &str| -> &'static str { format!("output_dir={}", run(name).display()).leak() };
    let arguments = |name: &str, more: &[&'static str]| {
        with_sets(&["train"], &[&JUDGED[..], &[output(name)], more].concat())
    };
    let (code, _, errors) = finish(mpirun(2, &arguments("unbroken", &[])));
    assert_eq!(code, 0, "{errors}");
    // The best one, of step 3, is waited for; then rank 0 is killed amid the next.
    let waiting = arguments(
        "killed",
        &["checkpoint.asynchronous=false", "debug.inject_fault=\"sleep@0:6:validate:60\""],
    );
    kill_at(mpirun(2, &waiting), "strikes at step 6", output("killed"));
    assert_eq!(best(&run("killed")), "step-00000003");
    let mut resumed = arguments("killed", &[]);
    resumed.extend(["--resume", "latest"]);
    let (code, _, errors) = finish(mpirun(2, &resumed));
    assert_eq!(code, 0, "{errors}");
    assert_eq!(validations(&run("killed")), validations(&run("unbroken")));
    assert_eq!(column(&run("killed"), "loss"), column(&run("unbroken"), "loss"));
    assert_eq!(best(&run("killed")), best(&run("unbroken")));
    let last = |name: &str| checkpoint(&run(name), 9);
    assert!(last("killed") == last("unbroken"));
    // The link is a checkpoint to every command.
    let out = root.path().join("samples.png");
    let best = run("killed").join("best");
    let (code, _, errors) = finish(program(&[
        "sample",
        "--run",
        best.to_str().unwrap(),
        "--steps",
        "2",
        "--per-condition",
        "1",
        "--out",
        out.to_str().unwrap(),
    ]));
    assert_eq!((code, out.exists()), (0, true), "{errors}");
}

#[test]
fn a_validation_is_told_in_the_log_and_drawn_in_the_report() {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={}", root.path().join("run").display());
    let (code, _, errors) =
        finish(program(&with_sets(&["train"], &[&JUDGED[..], &[&output]].concat())));
    assert_eq!(code, 0, "{errors}");
    for text in [
        "validation: 40 samples of 186 held out of 1797 (share 0.1), at 3 sigmas 0.10 to 0.90, every 3 steps",
        "[VALIDATION 0] loss ",
        "| by sigma 0.10: ",
        "| 40 samples, ",
    ] {
        assert!(errors.contains(text), "{text}: {errors}");
    }
    let report = fs::read_to_string(root.path().join("run/report.html")).unwrap();
    for text in
        ["Validation", "validation_loss", "val_loss", "Validation by sigma", "step 0", "step 9"]
    {
        assert!(report.contains(text), "{text}");
    }
    let facts = "<dt>steps</dt><dd>9</dd>";
    assert!(report.contains(facts), "the last line is a validation's, which counts no steps");
}

fn checked(sets: &[&str]) -> (i32, String) {
    let (code, plan, errors) = finish(program(&with_sets(&["check"], sets)));
    (code, plan + &errors)
}

#[test]
fn check_plans_a_validation_and_refuses_what_contradicts_it() {
    let (code, plan) = checked(&JUDGED);
    assert_eq!(code, 0, "{plan}");
    let has = |text: &str| assert!(plan.contains(text), "{text}: {plan}");
    has("validation             40 samples of 186 held out of 1797 (share 0.1), at 3 sigmas");
    // 40 samples x 4 forwards, and three forwards in a step of 32 samples.
    has(
        "  each                 5 of 5 blocks a rank x 4 forwards: about as long as 1.7 steps, 35.7 % of the time",
    );
    has("  its memory ");
    let (code, plan) = checked(&["validation.path=configs/digits", "validation.share=0.1"]);
    assert_eq!(code, 50, "{plan}");
    assert!(plan.contains("validation.share: 0.1 stands beside validation.path"), "{plan}");
    let (code, plan) = checked(&["validation.shares=0.1"]);
    assert!(code == 50 && plan.contains("did you mean validation.share?"), "{plan}");
    let (code, plan) = checked(&["validation.share=0.1", "flow_matching.sigma_min=0.5"]);
    assert!(code == 0 && plan.contains("validation.sigmas 0.1, 0.2, 0.3, … lie outside"), "{plan}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/digits");
    let own = format!("validation.path={}", folder.display());
    let (code, plan) = checked(&[&own]);
    assert!(code == 0 && plan.contains("are trained on, too"), "{plan}");
    let (code, plan) = checked(&["validation.path=nowhere"]);
    assert!(code == 40 && plan.contains("nowhere"), "{plan}");
}
