//! D: disks that fill up, fail, or hold what they should not. F: what the end of a run leaves.

use std::fs;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::{BESIDE, Case, STEPS, Started, turn, unbroken};
use crate::runs::{checkpoint, column};

#[test]
fn d1_a_save_that_is_cut_off_at_any_point_leaves_the_checkpoint_before() {
    for fault in ["kill@1:8:snapshot", "kill@0:8:write", "kill@1:8:sync", "kill@0:8:commit"] {
        let ended = Case { fault, sets: &[BESIDE], code: 137, seconds: 15.0, ..Case::default() }.run();
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
        let ended =
            Case { fault: &fault, sets: &[BESIDE], code: 30, says: &["error STORAGE rank 1/2", words, "exit 30"], ..Case::default() }.run();
        assert_eq!(ended.checkpoints(), [4], "{kind}");
        ended.resumes_to_the_unbroken_run(2, &[]);
    }
}

#[test]
fn d4_a_failed_sync_is_a_failed_save() {
    for fault in ["eio@1:8:sync", "eio@0:8:commit"] {
        let ended = Case { fault, code: 30, says: &["Input/output error", "exit 30"], ..Case::default() }.run();
        assert_eq!(ended.checkpoints(), [4], "{fault}");
    }
}

#[test]
fn d3_a_limit_on_the_size_of_files_is_told_like_a_full_disk() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let command = Case { ranks: 0, ..Case::default() }.command(&root);
    let mut limited = Command::new("bash");
    limited.args(["-c", "ulimit -f 64; exec \"$@\"", "bash"]).arg(command.get_program()).args(command.get_args());
    let (ended, code) = Started::new(limited).end(root, 30.0);
    assert_eq!(code, 30, "{}", ended.errors);
    assert!(ended.errors.contains("File too large"), "{}", ended.errors);
}

/// A file system of two megabytes, for root.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(folder.path()).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then_some(SmallDisk(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn d3_a_full_disk_is_told_with_path_and_sizes() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("SKIPPED: mounting a small file system needs root");
        return;
    };
    let _turn = turn();
    let output = format!("output_dir={}", disk.0.path().join("run").display());
    let root = TempDir::new().unwrap();
    let command = Case { sets: &[&output], ..Case::default() }.command(&root);
    let mut again = Command::new(command.get_program());
    // The case's own folder comes last, and the last one counts.
    again.args(command.get_args().filter(|word| !word.to_string_lossy().contains(root.path().to_str().unwrap())).collect::<Vec<_>>());
    again.args([&output]).envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let (ended, code) = Started::new(again).end(root, 30.0);
    assert_eq!(code, 30, "{}", ended.errors);
    assert!(ended.errors.contains("it needs ") && ended.errors.contains(" free"), "{}", ended.errors);
}

#[test]
fn d5_where_one_rank_cannot_write_nobody_commits_and_the_run_may_go_on() {
    let sets = ["checkpoint.on_failure=\"continue\"", BESIDE];
    let says = ["WARN", "No space left on device"];
    let ended = Case { fault: "enospc@1:8:write", sets: &sets, says: &says, never: &[], ..Case::default() }.run();
    assert_eq!(ended.checkpoints(), [4, STEPS], "the next one is whole");
    assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken(2, &[]));
}

#[test]
fn d16_a_slow_disk_delays_the_next_save_and_changes_nothing() {
    let ended = Case { fault: "sleep@1:4-12:write:0.1", sets: &[BESIDE], ..Case::default() }.run();
    assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken(2, &[]));
}

#[test]
fn f1_nobody_listening_and_no_place_for_logs_do_not_stop_a_run() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    // Without a launcher, which would itself end by the closed pipe.
    let command = Case { ranks: 0, ..Case::default() }.command(&root);
    // Standard error goes into a pipe that nobody reads from any more.
    let mut deaf = Command::new("bash");
    deaf.args(["-c", "set -o pipefail; \"$@\" 2> >(exec 0<&-; exit 0)", "bash"]).arg(command.get_program()).args(command.get_args());
    deaf.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let (ended, code) = Started::new(deaf).end(root, 30.0);
    assert_eq!(code, 0, "{}", ended.errors);
    assert_eq!(ended.checkpoints().last(), Some(&STEPS));
}

#[test]
fn f2_lines_of_several_ranks_never_tear() {
    let ended = Case { ranks: 4, sets: &["train.global_batch_size=32", "log.level=\"debug\""], ..Case::default() }.run();
    let torn: Vec<&str> = ended.errors.lines().filter(|line| line.matches("step-000000").count() > 1).collect();
    assert!(torn.is_empty(), "{torn:?}");
}

#[test]
fn f3_after_a_crash_every_step_stands_once_in_the_metrics() {
    let ended = Case { fault: "kill@1:7:backward", code: 137, ..Case::default() }.run();
    let ended = Case { words: &["--resume", "latest"], ..Case::default() }.run_in(ended.root);
    let steps: Vec<f64> = column(&ended.run_folder(), "loss").into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, (1..=STEPS).map(|step| step as f64).collect::<Vec<_>>());
}

#[test]
fn f4_a_rank_that_writes_for_long_is_waited_for() {
    let ended = Case { fault: "sleep@1:12:write:0.2", sets: &[BESIDE], ..Case::default() }.run();
    assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken(2, &[]));
    assert!(fs::read_dir(ended.run_folder()).unwrap().all(|entry| !entry.unwrap().file_name().to_string_lossy().ends_with(".tmp")));
}
