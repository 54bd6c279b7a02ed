//! C: processes that die, fail, hang or are slow while samples are judged.

use super::{Case, SHORT, SOON};

/// Validations before the first step, after every third and after the last.
const JUDGED: [&str; 3] =
    ["validation.share=0.05", "validation.every_n_steps=3", "validation.max_samples=24"];

#[test]
fn c1_a_rank_that_is_killed_while_samples_are_judged_ends_all() {
    let case = Case { sets: &JUDGED, code: 137, seconds: SOON, ..Case::default() };
    Case { fault: "kill@1:6:validate", ..case }.run();
}

#[test]
fn c4_an_error_while_samples_are_judged_is_said_with_its_phase() {
    for (fault, moment) in
        [("error@1:6:validate", "step 6 phase validate"), ("error@0:0:validate", "")]
    {
        let says = ["error ENVIRONMENT rank", moment, "was ordered. exit 52"];
        let sets = &JUDGED;
        Case { fault, sets, code: 52, says: &says, seconds: SOON, ..Case::default() }.run();
    }
}

#[test]
fn c5_a_rank_that_is_stopped_while_samples_are_judged_is_named_by_the_others() {
    let says = [
        "error HANG rank 0/2",
        "step 6 phase validate",
        "no progress for",
        "missing: 1 (host",
        "exit 21",
    ];
    let sets = [&SHORT[..], &JUDGED, &["watchdog.first_step_seconds=4"]].concat();
    let fault = "stop@1:6:validate";
    Case { fault, sets: &sets, code: 21, says: &says, seconds: SOON, ..Case::default() }.run();
}

#[test]
fn c8_a_pause_longer_than_a_step_may_take_is_no_hang_while_samples_are_judged() {
    // A step may take 3 seconds, and neither straggles a rank that judges for 4.
    let sets = [&SHORT[..], &JUDGED].concat();
    let never = ["HANG", "WARN straggler"];
    Case { fault: "sleep@1:6:validate:4", sets: &sets, never: &never, ..Case::default() }.run();
}
