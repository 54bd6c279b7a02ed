//! The best checkpoint stays, and the link leads to a whole one whatever fails.

use super::*;
use crate::run::checkpoint::best;

fn judged(step: u64, loss: f64, criterion: &str) -> Judged {
    Judged { step, loss, criterion: criterion.into() }
}

fn saved(run: &Path, losses: &[(u64, f64)]) {
    for (step, loss) in losses {
        save_judged(run, *step, Some(&judged(*step, *loss, "a"))).expect("a sound disk");
    }
}

#[test]
fn only_numbers_by_one_criterion_are_compared_and_the_first_of_equals_stays() {
    let others = [judged(2, 0.5, "a"), judged(4, 0.1, "b"), judged(6, f64::NAN, "a")];
    let is_best = |loss, criterion| judged(8, loss, criterion).is_below(others.iter());
    assert!(is_best(0.4, "a") && !is_best(0.5, "a") && !is_best(f64::NAN, "a"));
    assert!(is_best(0.05, "b") && !is_best(0.4, "b") && is_best(9.0, "c"));
}

#[test]
fn the_link_leads_to_the_lowest_and_heals() {
    let root = tempfile::tempdir().expect("a folder");
    let run = root.path();
    save_here(run, 1).expect("a sound disk");
    assert_eq!(best::best_step(run, "a").expect("a run folder"), None);
    saved(run, &[(2, 0.5), (4, 0.25), (6, 0.25)]);
    save_judged(run, 8, Some(&judged(8, 0.1, "b"))).expect("a sound disk");
    assert_eq!(best::linked(run), None);
    best::link_best(run, "a", Disk::PLAIN).expect("a sound disk");
    assert_eq!(best::linked(run), Some(4));
    assert_eq!(fs::canonicalize(run.join("best")).expect("it leads somewhere"), {
        fs::canonicalize(run.join("step-00000004")).expect("a checkpoint")
    });
    assert_eq!(list(run).expect("a run folder").len(), 5, "the link is no checkpoint of its own");
    fs::remove_dir_all(run.join("step-00000004")).expect("it is there");
    assert_eq!(best::linked(run), None, "what is gone is not spared");
    best::link_best(run, "a", Disk::PLAIN).expect("a sound disk");
    assert_eq!(best::linked(run), Some(6));
}

#[test]
fn whichever_call_fails_the_link_leads_to_a_whole_checkpoint_and_the_best_one_is_not_deleted() {
    let settings = CheckpointSettings { keep_last: 1, ..CheckpointSettings::default() };
    for calls in 0.. {
        let root = tempfile::tempdir().expect("a folder");
        let run = root.path();
        saved(run, &[(2, 0.5), (4, 0.75)]);
        best::link_best(run, "a", Disk::PLAIN).expect("a sound disk");
        let (outcome, made) = on_a_disk_that_fails_after(calls, || {
            save_judged(run, 6, Some(&judged(6, 0.25, "a")))?;
            best::link_best(run, "a", Disk::PLAIN)?;
            commit::prune(run, 6, &settings, best::best_step(run, "a")?)
        });
        let linked = best::linked(run).expect("the old one or the new one");
        let steps = sound_steps(run);
        assert!(
            steps.contains(&linked) && [2, 6].contains(&linked),
            "{calls}: {linked} of {steps:?}"
        );
        clear_leftovers(run).expect("a sound disk");
        if outcome.is_ok() {
            assert_eq!((linked, sound_steps(run)), (6, vec![6]));
            assert!(made.iter().any(|(call, _)| *call == FileOperation::Link));
            return;
        }
    }
}
