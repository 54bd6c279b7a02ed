//! A run with averages of its weights that is killed, and goes on at another number of ranks and
//! under another sharding, is the unbroken run; a skipped step moves no average.

use tempfile::TempDir;

use crate::faults::Case;
use crate::runs::{checkpoint, finish, kill_at, mpirun, tiny, with_sets};
use crate::threads::averages::check_each_step;

const SETS: [&str; 8] = [
    "max_steps=10",
    "checkpoint.every_n_steps=5",
    "checkpoint.asynchronous=false",
    "parallel.deterministic=true",
    "parallel.seed_scope=sample",
    "train.global_batch_size=32",
    "ema.decay=0.95",
    "ema.every_n_steps=2",
];

#[test]
fn a_killed_run_goes_on_with_its_averages_at_another_world_size() {
    let root = TempDir::new().unwrap();
    let output = |name: &str| format!("output_dir={}", root.path().join(name).display());
    let (whole, parts) = (output("whole"), output("parts"));
    let (code, _, errors) =
        finish(mpirun(1, &with_sets(&["train"], &[&SETS[..], &[&whole]].concat())));
    assert_eq!(code, 0, "{errors}");
    let of_parts = |settings: &[&'static str]| {
        [&SETS[..], &[parts.as_str()], settings].concat().iter().map(ToString::to_string).collect()
    };
    let waits = ["parallel.sharding=gradients", "debug.inject_fault=\"sleep@0:6:forward:60\""];
    let waiting: Vec<String> = of_parts(&waits);
    let waiting: Vec<&str> = waiting.iter().map(String::as_str).collect();
    kill_at(mpirun(2, &with_sets(&["train"], &waiting)), "step-00000005", &parts);
    let resumed: Vec<String> =
        of_parts(&["parallel.sharding=parameters", "parallel.recompute=always"]);
    let resumed: Vec<&str> = resumed.iter().map(String::as_str).collect();
    let arguments = with_sets(&["train", "--resume", "latest"], &resumed);
    let (code, _, errors) = finish(mpirun(4, &arguments));
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("resumed from"), "{errors}");
    let bytes = |name: &str| checkpoint(&root.path().join(name), 10);
    assert_eq!(bytes("whole"), bytes("parts"));
}

#[test]
fn a_step_that_is_skipped_moves_no_average() {
    let settings = ["ema.decay=0.9", "checkpoint.every_n_steps=1", "checkpoint.keep_last=99"];
    let sets = [&settings[..], &["train.on_non_finite=\"skip\"", "max_steps=9"]].concat();
    let says = ["WARN step 7 was skipped: "];
    let ended =
        Case { fault: "nan_loss@1:7:forward", sets: &sets, says: &says, ..Case::default() }.run();
    let ema = tiny(&["ema.decay=0.9"]).ema;
    check_each_step(&ended.root.path().join("run"), &ema, 9, Some(7));
}
