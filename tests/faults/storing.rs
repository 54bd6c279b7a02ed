//! D: disks that fill up, fail, or hold what they should not. F: what the end of a run leaves.

use std::fs;
use std::process::Command;

use tempfile::TempDir;

use super::{
    BESIDE, Case, SOON, START, STEPS, Started, assert_had_disk, on_a_small_disk, turn, unbroken,
};
use crate::runs::{checkpoint, column};

#[test]
fn d1_a_save_that_is_cut_off_at_any_point_leaves_the_checkpoint_before() {
    for fault in ["kill@1:8:snapshot", "kill@0:8:write", "kill@1:8:sync", "kill@0:8:commit"] {
        let ended =
            Case { fault, sets: &[BESIDE], code: 137, seconds: SOON, ..Case::default() }.run();
        assert_eq!(ended.checkpoints(), [4], "{fault}");
        ended.resumes_to_the_unbroken_run(2, &[]);
    }
}

#[test]
fn d3_d4_what_the_disk_refuses_ends_the_run_with_code_30_and_the_checkpoint_before() {
    for (kind, words) in [
        ("enospc", "No space left on device"),
        ("eio", "Input/output error"),
        ("edquot", "Disk quota exceeded"),
        ("erofs", "Read-only file system"),
        ("eacces", "Permission denied"),
    ] {
        let fault = format!("{kind}@1:8:write");
        let ended = Case {
            fault: &fault,
            sets: &[BESIDE],
            code: 30,
            says: &["error STORAGE rank 1/2", words, "exit 30"],
            ..Case::default()
        }
        .run();
        assert_eq!(ended.checkpoints(), [4], "{kind}");
        ended.resumes_to_the_unbroken_run(2, &[]);
    }
}

#[test]
fn d4_a_failed_sync_is_a_failed_save() {
    for fault in ["eio@1:8:sync", "eio@0:8:commit"] {
        let ended =
            Case { fault, code: 30, says: &["Input/output error", "exit 30"], ..Case::default() }
                .run();
        assert_eq!(ended.checkpoints(), [4], "{fault}");
    }
}

#[test]
fn d3_a_limit_on_the_size_of_files_is_told_like_a_full_disk() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let command = Case { ranks: 0, ..Case::default() }.command(&root);
    let mut limited = Command::new("bash");
    limited
        .args(["-c", "ulimit -f 64; exec \"$@\"", "bash"])
        .arg(command.get_program())
        .args(command.get_args());
    let (ended, code) = Started::new(limited).end(root, START);
    assert_eq!(code, 30, "{}", ended.errors);
    assert!(ended.errors.contains("File too large"), "{}", ended.errors);
}

#[test]
fn d3_a_full_disk_is_told_with_path_and_sizes() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let disk = root.path().join("run");
    let path = format!("{}/.step-", disk.display());
    let says = ["error STORAGE", "No space left on device", &path, "it needs ", " free", "exit 30"];
    let case = Case { code: 30, says: &says, never: &[], ..Case::default() };
    let command = on_a_small_disk(1 << 20, &disk, &case.command(&root), ":");
    let (ended, code) = Started::new(command).end(root, START);
    assert_had_disk(code, &ended.errors);
    case.judge(&ended, code);
}

#[test]
fn d7_a_resume_of_nothing_never_begins_anew_and_ends_with_code_44() {
    let says = [
        "error NO_CKPT rank 0/2",
        "there is no such folder, and no run to go on with; start with --resume never, or with --resume auto",
    ];
    let ended = Case {
        words: &["--resume", "latest"],
        code: 44,
        says: &says,
        seconds: SOON,
        ..Case::default()
    }
    .run();
    assert!(!ended.run_folder().exists());
}

#[test]
fn d5_where_one_rank_cannot_write_nobody_commits_and_the_run_may_go_on() {
    let sets = ["checkpoint.on_failure=\"continue\"", BESIDE];
    let says = ["WARN", "No space left on device"];
    let ended =
        Case { fault: "enospc@1:8:write", sets: &sets, says: &says, never: &[], ..Case::default() }
            .run();
    assert_eq!(ended.checkpoints(), [4, STEPS], "the next one is whole");
    assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken(2, &[]));
}

#[test]
fn d16_a_slow_disk_delays_the_next_save_and_changes_nothing() {
    let sets = [BESIDE, "flow_matching.summary_log_interval=1"];
    let ended = Case { fault: "sleep@1:4-12:write:0.1", sets: &sets, ..Case::default() }.run();
    assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken(2, &[]));
    let line = |text: &str| {
        ended
            .errors
            .lines()
            .position(|line| line.contains(text))
            .unwrap_or_else(|| panic!("{}", ended.errors))
    };
    assert!(
        line("[STEP 5]") < line("step-00000004"),
        "steps wait for the copy alone:\n{}",
        ended.errors
    );
}

#[test]
fn f1_a_run_to_which_nobody_listens_goes_on() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    // Without a launcher, which would itself end by the closed pipe.
    let command = Case { ranks: 0, ..Case::default() }.command(&root);
    // Standard error goes into a pipe that nobody reads from any more.
    let mut deaf = Command::new("bash");
    deaf.args(["-c", "set -o pipefail; \"$@\" 2> >(exec 0<&-; exit 0)", "bash"])
        .arg(command.get_program())
        .args(command.get_args());
    deaf.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let (ended, code) = Started::new(deaf).end(root, START);
    assert_eq!(code, 0, "{}", ended.errors);
    assert_eq!(ended.checkpoints().last(), Some(&STEPS));
}

#[test]
fn f1_f2_without_a_place_for_logs_each_rank_warns_once_in_a_line_of_its_own() {
    let root = TempDir::new().unwrap();
    let run = root.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::write(run.join("log"), "a file where the folder should be").unwrap();
    let ended =
        Case { ranks: 4, sets: &["train.global_batch_size=32"], ..Case::default() }.run_in(root);
    let warned =
        ended.errors.lines().filter_map(|line| Some(line.split_once(" WARN ")?.1.to_string()));
    let mut warned: Vec<String> = warned.collect();
    warned.sort();
    let trouble = format!(
        "no log file under {}: File exists (os error 17); logging to standard error only",
        run.display()
    );
    let of_ranks =
        ["[rank 1] ", "[rank 2] ", "[rank 3] ", ""].map(|rank| format!("{rank}{trouble}"));
    assert_eq!(warned, of_ranks, "{}", ended.errors);
    assert_eq!(ended.checkpoints().last(), Some(&STEPS));
}

#[test]
fn f1_a_full_disk_under_the_log_is_warned_of_once() {
    let root = TempDir::new().unwrap();
    let log = root.path().join("run/log");
    fs::create_dir_all(&log).unwrap();
    std::os::unix::fs::symlink("/dev/full", log.join("rank-00000.jsonl")).unwrap();
    let ended = Case::default().run_in(root);
    let warned = ended.errors.lines().filter(|line| line.contains("WARN")).collect::<Vec<_>>();
    assert!(
        warned.len() == 1
            && warned[0].contains("No space left on device (os error 28); the run goes on"),
        "{}",
        ended.errors
    );
    assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken(2, &[]));
}

#[test]
fn f3_after_a_crash_every_step_stands_once_in_the_metrics() {
    let ended = Case { fault: "kill@1:7:backward", code: 137, ..Case::default() }.run();
    let ended = Case { words: &["--resume", "latest"], ..Case::default() }.run_in(ended.root);
    let steps: Vec<f64> =
        column(&ended.run_folder(), "loss").into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, (1..=STEPS).map(|step| step as f64).collect::<Vec<_>>());
}

#[test]
fn f4_a_rank_that_writes_for_long_is_waited_for() {
    let ended = Case { fault: "sleep@1:12:write:0.2", sets: &[BESIDE], ..Case::default() }.run();
    assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken(2, &[]));
    assert!(
        fs::read_dir(ended.run_folder()).unwrap().all(|entry| !entry
            .unwrap()
            .file_name()
            .to_string_lossy()
            .ends_with(".tmp"))
    );
}
