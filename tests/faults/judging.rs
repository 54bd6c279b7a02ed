//! C: processes that die, fail, hang or are slow while samples are judged.

use super::{Case, SHORT, SOON};
use crate::runs::column;

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
fn c8_a_long_pause_while_samples_are_judged_is_no_hang_and_in_no_steps_time() {
    // A step may take 3 seconds.
    let sets = [&SHORT[..], &JUDGED].concat();
    let never = ["HANG", "WARN straggler"];
    let fault = "sleep@1:6:validate:8";
    let ended = Case { fault, sets: &sets, never: &never, ..Case::default() }.run();
    let seconds = column(&ended.run_folder(), "step_seconds");
    assert_eq!(seconds.len(), 12);
    assert!(seconds.iter().all(|(_, seconds)| *seconds < 3.0), "{seconds:?}");
    // 12 steps of 16 samples would be fewer than 24 a second.
    let (_, speed) = *column(&ended.run_folder(), "samples_per_second").last().unwrap();
    assert!(speed > 24.0, "{speed} samples a second");
}
