//! E: numbers that are not finite, losses that stand out, ranks that drift apart.

use super::{Case, STEPS, unbroken};
use crate::runs::{checkpoint, column};

#[test]
fn e1_a_loss_that_is_nan_on_one_rank_is_found_by_all_before_the_update_with_code_41() {
    let says = [
        "error NUMERIC rank 1/2",
        "step 7: rank 1, micro-batch 0: loss exploded: NaN in samples",
        "at sigma",
        "nothing was updated",
    ];
    let way_back = ["step-00000004. exit 41"];
    let says = [&says[..], &way_back].concat();
    let ended =
        Case { fault: "nan_loss@1:7:forward", code: 41, says: &says, ..Case::default() }.run();
    assert_eq!(ended.checkpoints(), [4]);
    ended.resumes_to_the_unbroken_run(2, &[]);
}

#[test]
fn e1_a_step_that_is_not_sound_may_be_skipped_on_all_ranks() {
    let sets = ["train.on_non_finite=\"skip\""];
    let says = [
        "WARN step 7 was skipped: rank 1, micro-batch 0: loss exploded: NaN",
        "1 of the last 100 steps skipped, 5 may be",
    ];
    let ended =
        Case { fault: "nan_loss@1:7:forward", sets: &sets, says: &says, ..Case::default() }.run();
    assert_eq!(ended.checkpoints().last(), Some(&STEPS));
    assert!(checkpoint(&ended.run_folder(), STEPS) != unbroken(2, &[]), "a step is missing");
    assert_eq!(
        column(&ended.run_folder(), "loss").len() as u64,
        STEPS - 1,
        "a step without a loss has no point in its curve"
    );
}

#[test]
fn e2_one_number_of_one_gradient_is_found_with_its_parameter() {
    let says = [
        "error NUMERIC rank 1/2",
        "1 numbers of the gradient of `blocks.1.",
        "are sound; nothing was updated",
        "exit 41",
    ];
    let ended =
        Case { fault: "nan_grad@1:7:backward:2", code: 41, says: &says, ..Case::default() }.run();
    ended.resumes_to_the_unbroken_run(2, &[]);
}

#[test]
fn e2_e3_under_sharding_and_bfloat16_a_gradient_that_overflows_is_skipped_and_named() {
    let sets = [
        "train.on_non_finite=\"skip\"",
        "model.dtype=\"bfloat16\"",
        "parallel.sharding=\"parameters\"",
        "parallel.recompute=\"always\"",
        "parallel.reduce_dtype=\"bfloat16\"",
    ];
    let says = ["WARN step 7 was skipped: rank 1, micro-batch 0: 1 numbers of the gradient of `"];
    Case { fault: "nan_grad@1:7:backward:1", sets: &sets, says: &says, ..Case::default() }.run();
}

#[test]
fn e5_more_skipped_steps_than_the_budget_bears_stop_the_run() {
    let sets = ["train.on_non_finite=\"skip\"", "train.skip_budget=2"];
    let says = [
        "error NUMERIC rank 0/2",
        "step 9",
        "3 of the last 100 steps would be skipped, train.skip_budget is 2",
        "step-00000008. exit 41",
    ];
    Case {
        fault: "nan_loss@1:7-11:forward",
        sets: &sets,
        code: 41,
        says: &says,
        ..Case::default()
    }
    .run();
}

#[test]
fn e4_a_loss_that_stands_out_is_warned_of_skipped_or_stops_the_run() {
    let policy = |word: &str| format!("train.on_loss_spike={word:?}");
    let run = |word: &str, code: i32, says: &[&str], never: &[&str]| {
        let (policy, fault) = (policy(word), "spike@1:40:forward:6");
        let sets = ["max_steps=42", "checkpoint.every_n_steps=100", &policy];
        Case { fault, sets: &sets, code, says, never, ..Case::default() }.run()
    };
    run("warn", 0, &["WARN step 40: the loss", "deviations above the median"], &["skipped"]);
    run("skip", 0, &["WARN step 40 was skipped: the loss", "deviations above the median"], &[]);
    run("stop", 41, &["error NUMERIC rank 0/2", "step 40: the loss", "nothing was updated"], &[]);
    run("ignore", 0, &[], &["WARN step"]);
}

#[test]
fn e6_parameters_that_differ_are_found_before_they_are_saved_with_code_42() {
    let says = [
        "error DESYNC",
        "rank 1 holds other parameters than the rest",
        "`",
        "nothing was saved",
        "exit 42",
    ];
    let sets = ["train.global_batch_size=24"];
    let ended = Case {
        ranks: 3,
        fault: "bit_flip@1:6:optimizer:1",
        sets: &sets,
        code: 42,
        says: &says,
        ..Case::default()
    }
    .run();
    assert_eq!(ended.checkpoints(), [4]);
    ended.resumes_to_the_unbroken_run(3, &sets);
}

#[test]
fn e6_parameters_are_compared_between_saves_as_well() {
    let sets = ["watchdog.compare_every_n_steps=3", "checkpoint.every_n_steps=100"];
    Case {
        fault: "bit_flip@1:5:optimizer",
        sets: &sets,
        code: 42,
        says: &["step 6 phase compare", "exit 42"],
        ..Case::default()
    }
    .run();
}

#[test]
fn e7_ranks_that_begin_with_other_weights_do_not_begin() {
    let says = ["error DESYNC", "other parameters", "nothing was saved", "exit 42"];
    let ended =
        Case { fault: "bit_flip@1:0:open:1", code: 42, says: &says, ..Case::default() }.run();
    assert!(ended.checkpoints().is_empty());
}

#[test]
fn e8_a_collective_that_one_rank_issues_alone_is_told() {
    let says = ["error DESYNC", "exit 42"];
    Case { fault: "extra_collective@1:6:reduce", code: 42, says: &says, ..Case::default() }.run();
}

#[test]
fn e11_a_step_that_is_sound_when_it_is_repeated_is_told_as_such() {
    let says =
        ["every rank's own losses and gradients are finite when the step is repeated", "exit 41"];
    Case { fault: "nan_loss@1:7:forward:1", code: 41, says: &says, ..Case::default() }.run();
}
