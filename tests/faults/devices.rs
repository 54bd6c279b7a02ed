//! C: devices that fail, and memory that runs out, in a library's recorded words.

use super::{Case, Ended, SOON, START, Started, turn};
use std::process::Command;

use tempfile::TempDir;

/// Runs a case in which one rank meets the fault; all must end soon. A rank that waits in a
/// collective for the one that failed is ended by it.
fn on_one_rank(case: Case<'_>) -> Ended {
    let batch = format!("train.global_batch_size={}", 8 * case.ranks);
    let never = ["panicked", "error BUG", "WARN straggler"];
    Case { sets: &[&batch], never: &never, seconds: SOON, ..case }.run()
}

#[test]
fn c4_a_device_that_fails_on_one_rank_ends_all_with_code_23_and_its_stage() {
    let words = "CUDA error: an illegal memory access was encountered. Kernels run behind the \
                 host, so the place may be late: CUDA_LAUNCH_BLOCKING=1 finds it. exit 23";
    for (fault, ranks, place, stage) in [
        ("device@1:6:forward:1", 2, "step 6 phase forward stage 1 (blocks.0): ", Some("blocks.0")),
        ("device@1:6:backward:2", 4, " stage 2 (blocks.1): ", Some("blocks.1")),
        ("device@1:6:optimizer", 3, "step 6 phase optimizer#", None),
    ] {
        let says = ["error DEVICE rank 1/", place, words];
        let case = Case { ranks, fault, code: 23, says: &says, ..Case::default() };
        let ended = on_one_rank(case);
        assert_eq!(stage.is_none(), !ended.errors.contains(" stage "), "{}", ended.errors);
        let failure = ended.failure(1);
        assert_eq!(
            (failure["code"].as_i64(), failure["stage_name"].as_str()),
            (Some(23), stage),
            "{failure}"
        );
    }
}

#[test]
fn c4_memory_that_runs_out_on_one_rank_ends_all_with_code_53_and_a_smaller_choice() {
    let words = [
        "error MEMORY rank ",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB \
         of which 1.29 GiB is free.",
        "; check predicted 16",
        " MiB with parallel.recompute = \"always\". exit 53",
    ];
    for (fault, ranks, place) in [
        ("out_of_memory@1:6:forward:0", 2, "step 6 phase forward stage 0 (embed): "),
        ("out_of_memory@3:6:backward:1", 4, " stage 1 (blocks.0): "),
        ("out_of_memory@0:6:optimizer", 2, "step 6 phase optimizer#"),
    ] {
        let says = [&words[..], &[place]].concat();
        on_one_rank(Case { ranks, fault, code: 53, says: &says, ..Case::default() });
    }
}

#[test]
fn c4_memory_that_runs_out_beside_the_steps_has_advice_of_its_own() {
    for (fault, words) in [
        (
            "out_of_memory@1:6:read",
            [
                "phase read: ",
                "lower data.prefetch, or data.micro_batch_size_per_gpu or data.micro_batch_tokens_per_gpu. exit 53",
            ],
        ),
        (
            "out_of_memory@1:4:snapshot",
            ["phase snapshot#", "of host memory for a save's copy on the rank that writes most"],
        ),
        (
            "out_of_memory@1:12:report",
            ["phase report#", "lower sampling.per_condition, or use more memory. exit 53"],
        ),
    ] {
        let says = [&["error MEMORY rank 1/2"][..], &words].concat();
        on_one_rank(Case { fault, code: 53, says: &says, ..Case::default() });
    }
}

#[test]
fn c2_too_little_memory_ends_the_run_with_a_line() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    // One parameter alone asks for more than there is.
    let case = Case {
        ranks: 0,
        sets: &["model.dit.width=16384", "model.dit.num_heads=128"],
        ..Case::default()
    };
    let command = case.command(&root);
    let mut limited = Command::new("bash");
    limited
        .args(["-c", "ulimit -v 3000000; exec \"$@\"", "bash"])
        .arg(command.get_program())
        .args(command.get_args());
    let (ended, code) = Started::new(limited).end(root, START);
    assert_eq!(code, 53, "{}", ended.errors);
    for words in [
        "error MEMORY",
        "can't allocate memory",
        " GiB of the host, ",
        "check predicted ",
        "the least with a single setting: use more ranks, or more memory. exit 53",
    ] {
        assert!(ended.errors.contains(words), "{words:?} was not said:\n{}", ended.errors);
    }
}
