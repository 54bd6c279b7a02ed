//! C: processes that die, stop, hang, are slow or are asked to stop.

use super::{Case, Ended, SHORT, SOON, START, STEPS, Started, signal, turn, unbroken};
use crate::runs::checkpoint;
use std::fs;

use tempfile::TempDir;

#[test]
fn c1_a_rank_that_is_killed_in_any_phase_ends_the_run_with_code_137_which_goes_on_to_the_same_bytes()
 {
    for fault in [
        "kill@1:6:data",
        "kill@0:6:backward",
        "kill@1:7:reduce",
        "kill@1:8:write",
        "kill@0:8:commit",
    ] {
        let ended = Case { fault, code: 137, seconds: SOON, ..Case::default() }.run();
        assert_eq!(ended.checkpoints(), [4], "{fault}");
        ended.resumes_to_the_unbroken_run(2, &[]);
    }
}

#[test]
fn c1_a_rank_that_is_killed_before_there_is_anything_leaves_nothing_in_the_way() {
    for fault in ["kill@1:0:bootstrap", "kill@1:0:open", "kill@1:2:forward"] {
        let ended = Case { fault, code: 137, seconds: SOON, ..Case::default() }.run();
        if ended.run_folder().exists() {
            assert!(ended.checkpoints().is_empty(), "{fault}");
            ended.starts_again_as_the_unbroken_run(2, &[]);
        }
    }
}

#[test]
fn c2_a_rank_that_crashes_ends_the_run_with_its_signal() {
    for (fault, code) in [("segv@1:6:forward", 139), ("abort@1:6:forward", 134)] {
        Case { fault, code, seconds: SOON, ..Case::default() }
            .run()
            .resumes_to_the_unbroken_run(2, &[]);
    }
}

#[test]
fn c3_b12_a_panic_on_any_thread_of_one_rank_says_where_and_ends_all_with_code_70() {
    for fault in ["panic@1:6:forward", "panic@1:every:read", "panic@1:6:draw", "panic@1:8:write"] {
        let says =
            ["error BUG rank 1/2", "panicked at src/fault.rs", "a fault was ordered", "exit 70"];
        let ended = Case { fault, code: 70, says: &says, seconds: SOON, ..Case::default() }.run();
        if ended.run_folder().join("failure-1.json").exists() {
            let failure = ended.failure(1);
            assert_eq!(
                (failure["code"].as_i64(), failure["name"].as_str()),
                (Some(70), Some("BUG"))
            );
            assert!(failure["backtrace"].as_str().unwrap().contains("fm_dist"), "{failure}");
        }
    }
}

#[test]
fn c4_an_error_on_one_rank_ends_all_with_its_code() {
    // What breaks while noise is drawn ahead, beside step 5, breaks the step that needs it.
    for (fault, moment) in
        [("error@1:6:forward", "step 6 phase forward"), ("error@1:6:draw", "step 6 phase draw")]
    {
        let says = ["error ENVIRONMENT rank 1/2", moment, "was ordered. exit 52"];
        let ended = Case { fault, code: 52, says: &says, seconds: SOON, ..Case::default() }.run();
        let message = format!("fault {fault} was ordered");
        assert_eq!(ended.failure(1)["message"].as_str(), Some(message.as_str()));
        ended.resumes_to_the_unbroken_run(2, &[]);
    }
}

#[test]
fn c4_what_all_ranks_meet_at_once_is_said_by_one() {
    for (fault, code, says) in [
        ("error@every:6:forward", 52, "was ordered"),
        ("panic@every:1:backward", 70, "a fault was ordered"),
        ("device@every:6:optimizer", 23, "error DEVICE"),
    ] {
        let sets = ["train.global_batch_size=32"];
        Case {
            ranks: 4,
            fault,
            sets: &sets,
            code,
            says: &[says],
            seconds: SOON,
            ..Case::default()
        }
        .run();
    }
}

#[test]
fn c5_a_rank_that_is_stopped_is_named_by_the_others_with_code_21() {
    let says =
        ["error HANG rank 0/3", "no progress for", "arrived: 0 2; missing: 1 (host", "exit 21"];
    let sets = [&SHORT[..], &["train.global_batch_size=24"]].concat();
    let ended = Case {
        ranks: 3,
        fault: "stop@1:6:backward",
        sets: &sets,
        code: 21,
        says: &says,
        seconds: SOON,
        ..Case::default()
    }
    .run();
    assert_eq!(ended.failure(0)["code"].as_i64(), Some(21));
    ended.resumes_to_the_unbroken_run(3, &["train.global_batch_size=24"]);
}

#[test]
fn c5_where_rank_0_is_stopped_another_speaks() {
    let says = ["error HANG rank 1/2", "missing: 0 (host", "silent for", "exit 21"];
    Case {
        fault: "stop@0:6:backward",
        sets: &SHORT,
        code: 21,
        says: &says,
        seconds: SOON,
        ..Case::default()
    }
    .run();
}

#[test]
fn c6_a_rank_that_computes_for_ever_is_named() {
    let says =
        ["error HANG rank 0/2", "missing: 1 (host", "step 6 phase forward", "there for", "exit 21"];
    Case {
        fault: "spin@1:6:forward",
        sets: &SHORT,
        code: 21,
        says: &says,
        seconds: SOON,
        ..Case::default()
    }
    .run();
}

#[test]
fn c6_a_run_of_one_process_is_watched_as_well() {
    let says = ["error HANG rank 0/1", "step 6 phase forward: no progress for", "exit 21"];
    Case {
        ranks: 0,
        fault: "spin@0:6:forward",
        sets: &SHORT,
        code: 21,
        says: &says,
        seconds: SOON,
        ..Case::default()
    }
    .run();
}

#[test]
fn c7_a_slow_rank_is_reported_and_the_run_goes_on() {
    let sets = ["max_steps=24"];
    let says = ["WARN straggler: rank 1 takes 0.1", "s a step in data"];
    Case {
        fault: "sleep@1:every:data:0.1",
        sets: &sets,
        says: &says,
        never: &["straggler: rank 0"],
        ..Case::default()
    }
    .run();
}

#[test]
fn c7_a_hundred_clean_steps_raise_no_alarm() {
    // A neighbour on one of the cores makes a straggler of its rank.
    let sets = ["max_steps=100", "watchdog.straggler_ratio=1000"];
    Case { sets: &sets, never: &["WARN"], ..Case::default() }.run();
}

#[test]
fn c8_a_long_pause_is_no_hang_where_its_phase_may_take_it() {
    let sets = ["watchdog.step_seconds=2", "watchdog.step_medians=1", "watchdog.save_seconds=60"];
    Case { fault: "sleep@1:4:snapshot:4", sets: &sets, never: &["HANG"], ..Case::default() }.run();
}

/// Asked to stop in the middle of a step, all ranks save that step, once, and leave with code 10;
/// the run goes on from there.
fn asked(ended: Ended, step: u64, ranks: usize) {
    assert!(
        ended.errors.contains(&format!("stopped after step {step}, as was asked")),
        "{}",
        ended.errors
    );
    assert_eq!(ended.checkpoints().last(), Some(&step));
    ended.resumes_to_the_unbroken_run(ranks, &[]);
}

#[test]
fn c9_c10_c11_one_rank_that_gets_a_signal_stops_all_with_one_checkpoint_and_code_10() {
    for fault in [
        "usr1@1:6:backward",
        "usr2@1:6:forward",
        "term@1:6:forward",
        "int@0:6:data",
        "usr1@1:8:write",
        "usr1@1:0:open",
    ] {
        let ended = Case { fault, code: 10, ..Case::default() }.run();
        let step = if fault.contains("write") {
            *ended.checkpoints().last().unwrap()
        } else if fault.contains("open") {
            1
        } else {
            6
        };
        asked(ended, step, 2);
    }
}

/// What becomes of a case whose first process, once its fault struck, gets a signal.
fn signalled(case: &Case<'_>, name: &str) -> (Ended, i32) {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let mut started = Started::new(case.command(&root));
    started.hear("strikes");
    signal(name, &started.pid().to_string());
    started.end(root, case.seconds)
}

#[test]
fn c9_sigusr1_to_the_launcher_reaches_the_ranks() {
    let (ended, code) = signalled(&Case { fault: "sleep@0:6:data:2", ..Case::default() }, "USR1");
    assert_eq!(code, 10, "{}", ended.errors);
    asked(ended, 6, 2);
}

#[test]
fn c9_who_asks_twice_gets_one_checkpoint() {
    // Two micro-batches have two backward passes.
    let sets = ["train.global_batch_size=32"];
    let ended = Case { fault: "usr1@1:6:backward", sets: &sets, code: 10, ..Case::default() }.run();
    assert_eq!(ended.errors.matches("strikes at step 6").count(), 2, "{}", ended.errors);
    assert_eq!(ended.checkpoints(), [4, 6]);
}

#[test]
fn c9_a_request_after_the_last_step_changes_nothing() {
    for fault in ["usr1@0:12:report", "usr1@1:12:finalize"] {
        let ended = Case { fault, ..Case::default() }.run();
        assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken(2, &[]), "{fault}");
    }
}

#[test]
fn c9_a_request_while_samples_are_generated_leaves_them_out() {
    for (ranks, fault) in [(0, "int@0:12:report"), (2, "usr1@1:12:report")] {
        let sets = ["sampling.num_steps=10000", "sampling.per_condition=100"];
        let says = ["asked to stop after the last step: the report has no samples"];
        let ended =
            Case { ranks, fault, sets: &sets, says: &says, seconds: SOON, ..Case::default() }.run();
        assert_eq!(ended.checkpoints().last(), Some(&STEPS));
        assert!(
            ended.run_folder().join("report.html").exists()
                && ended.run_folder().join("loss.png").exists()
        );
    }
}

#[test]
fn c9_a_request_while_a_checkpoint_is_verified_ends_the_start_with_code_10() {
    let ended = Case { fault: "kill@1:6:data", code: 137, ..Case::default() }.run();
    let says = ["fm-dist: stopped rank 0/2", "asked to stop before the first step", "exit 10"];
    let resume = ["--resume", "latest"];
    let case = Case {
        fault: "usr1@0:0:open",
        words: &resume,
        code: 10,
        says: &says,
        seconds: SOON,
        ..Case::default()
    };
    case.run_in(ended.root).resumes_to_the_unbroken_run(2, &[]);
}

#[test]
fn c10_sigterm_to_the_launcher_ends_the_run_at_once_and_leaves_whole_checkpoints() {
    let (ended, code) =
        signalled(&Case { fault: "sleep@0:6:data:60", seconds: SOON, ..Case::default() }, "TERM");
    assert_ne!(code, 0, "{}", ended.errors);
    assert_eq!(ended.checkpoints(), [4]);
    ended.resumes_to_the_unbroken_run(2, &[]);
}

#[test]
fn c11_a_terminal_that_goes_away_asks_to_stop() {
    let (ended, code) =
        signalled(&Case { ranks: 0, fault: "sleep@0:6:data:2", ..Case::default() }, "HUP");
    assert_eq!(code, 10, "{}", ended.errors);
    asked(ended, 6, 0);
}

#[test]
fn c11_a_second_ctrl_c_ends_the_process_at_once_with_code_130() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let mut started = Started::new(
        Case { ranks: 0, fault: "sleep@0:6:data:60", ..Case::default() }.command(&root),
    );
    started.hear("fault sleep@0:6:data:60 strikes");
    let pid = started.pid().to_string();
    signal("INT", &pid);
    // A signal that is still pending swallows the next of its kind.
    while fs::read_to_string(format!("/proc/{pid}/status")).unwrap().lines().any(|line| {
        line.strip_prefix("ShdPnd:")
            .is_some_and(|pending| !pending.trim().trim_start_matches('0').is_empty())
    }) {}
    signal("INT", &pid);
    let (ended, code) = started.end(root, SOON);
    assert_eq!(code, 130, "{}", ended.errors);
}

#[test]
fn c12_a_run_stops_by_itself_after_its_time() {
    let case = Case {
        fault: "sleep@1:every:data:0.3",
        sets: &["checkpoint.every_n_steps=1000", "max_steps=1000"],
        words: &["--stop-after", "5s"],
        code: 10,
        says: &["as was asked"],
        never: &[],
        ..Case::default()
    };
    assert_eq!(case.run().checkpoints().len(), 1);
}

#[test]
fn c13_ranks_do_not_outlive_a_launcher_that_is_killed() {
    let (ended, code) =
        signalled(&Case { fault: "sleep@0:6:data:60", seconds: SOON, ..Case::default() }, "KILL");
    assert_eq!(code, 137, "{}", ended.errors);
    // Its lock is stale: the process that held it is gone.
    ended.resumes_to_the_unbroken_run(2, &[]);
}

#[test]
fn c17_starts_that_lead_nowhere_come_to_an_end_with_code_43() {
    let resume = ["--resume", "latest"];
    let mut ended = Case { fault: "error@1:6:forward", code: 52, ..Case::default() }.run();
    for _ in 0..2 {
        ended = Case { fault: "error@1:6:forward", words: &resume, code: 52, ..Case::default() }
            .run_in(ended.root);
    }
    let says = ["error NO_PROGRESS rank 0/2", "step 4", "was ordered", "exit 43"];
    Case { words: &resume, code: 43, says: &says, ..Case::default() }.run_in(ended.root);
}

#[test]
fn a_file_named_save_asks_for_a_checkpoint_and_save_quit_for_the_end() {
    let unbroken = unbroken(2, &[]);
    for (name, code) in [("save", 0), ("save_quit", 10)] {
        let _turn = turn();
        let root = TempDir::new().unwrap();
        let case = Case {
            fault: "sleep@0:6:data:2",
            sets: &["checkpoint.keep_last=10"],
            ..Case::default()
        };
        let mut started = Started::new(case.command(&root));
        started.hear("fault sleep@0:6:data:2 strikes");
        fs::write(root.path().join("run").join(name), "").unwrap();
        let (ended, found) = started.end(root, START);
        assert_eq!(found, code, "{}", ended.errors);
        let expected: &[u64] = if code == 0 { &[4, 6, 8, 12] } else { &[4, 6] };
        assert_eq!(ended.checkpoints(), expected, "{}", ended.errors);
        assert!(!ended.run_folder().join(name).exists(), "each is done once");
        if code == 0 {
            assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken, "saving changes nothing");
        }
    }
}
