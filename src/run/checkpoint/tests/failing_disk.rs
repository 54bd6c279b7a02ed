//! Saves and deletions on a disk that fails, or loses its power, after any of their calls.

use super::*;

/// Leaves only what a power cut after these calls would leave: it removes files that were not
/// synced and entries of folders that were not synced.
fn cut_power(run: &Path, calls: &[(FileOperation, PathBuf)]) {
    let done = |operation: FileOperation, path: &Path| {
        calls.iter().any(|(made, at)| (*made, at.as_path()) == (operation, path))
    };
    let renamed = calls
        .iter()
        .find(|(call, _)| *call == FileOperation::Rename)
        .map(|(_, target)| target.clone());
    for (_, path) in calls.iter().filter(|(call, _)| *call == FileOperation::Create) {
        let folder = path.parent().expect("a file in a folder");
        let now = renamed.as_deref().unwrap_or(folder).join(path.file_name().expect("a file"));
        if !done(FileOperation::SyncFolder, folder) {
            fs::remove_file(now).expect("it was created");
        } else if !done(FileOperation::Sync, path) {
            File::create(now).expect("an empty file");
        }
    }
    if let Some(target) = renamed.filter(|_| !done(FileOperation::SyncFolder, run)) {
        fs::rename(target, run.join(".step-00000010.tmp")).expect("the rename is undone");
    }
}

#[test]
fn d2_d4_whichever_call_of_a_save_fails_the_newest_checkpoint_is_one_that_was_committed() {
    for calls in 0.. {
        let mut saved = false;
        for power_is_cut in [false, true] {
            let root = tempfile::tempdir().expect("a folder");
            let run = root.path();
            save_here(run, 5).expect("a sound disk");
            let (outcome, made) = on_a_disk_that_fails_after(calls, || save_here(run, 10));
            if power_is_cut {
                cut_power(run, &made);
            }
            let newest = *sound_steps(run).last().expect("the one before is never touched");
            match outcome {
                Ok(()) => assert_eq!(newest, 10, "what was said to be saved outlives a power cut"),
                Err(error) => {
                    assert_eq!(error.exit_code(), 30);
                    assert!(
                        error.to_string().contains("Input/output error (os error 5)"),
                        "{error}"
                    );
                }
            }
            clear_leftovers(run).expect("a sound disk");
            assert_eq!(
                fs::read_dir(run).expect("a run folder").count(),
                sound_steps(run).len(),
                "no leftovers"
            );
            saved = made.len() < calls;
        }
        if saved {
            assert!(
                calls > 10,
                "a save is folders, files, writes, syncs and a rename: {calls} calls"
            );
            return;
        }
    }
}

#[test]
fn whichever_call_of_a_deletion_fails_what_is_listed_is_whole() {
    let settings =
        CheckpointSettings { keep_last: 1, keep_every: Some(4), ..CheckpointSettings::default() };
    for calls in 0.. {
        let root = tempfile::tempdir().expect("a folder");
        let run = root.path();
        (2..=5).for_each(|step| save_here(run, step).expect("a sound disk"));
        let (outcome, made) =
            on_a_disk_that_fails_after(calls, || commit::prune(run, 5, &settings, None));
        assert_eq!(sound_steps(run)[..].iter().rev().take(2).copied().collect::<Vec<_>>(), [5, 4]);
        clear_leftovers(run).expect("a sound disk");
        if outcome.is_ok() {
            assert_eq!(
                (sound_steps(run), made.len()),
                (vec![4, 5], 4),
                "a rename and a deletion for each of two"
            );
            return;
        }
    }
}
