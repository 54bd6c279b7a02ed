//! `starts.json` records the step of every resume. It stops a crash loop: the third resume in a row
//! from one step is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::durable::replace_file;

const FILE: &str = "starts.json";
/// Number of resumes from one step without a newer checkpoint that are allowed.
const PATIENCE: usize = 2;

#[derive(Deserialize, Serialize)]
struct Start {
    step: u64,
    /// Time in UTC.
    time: String,
}

/// The fields of `failure-<rank>.json` that are read.
#[derive(Deserialize)]
pub struct Failure {
    pub code: i32,
    pub name: String,
    pub rank: usize,
    pub message: String,
    time: f64,
}

/// Refuses the third resume in a row from one step.
///
/// # Errors
/// [`Error::NoProgress`] with the last failure.
pub fn guard(run: &Path, step: u64) -> Result<()> {
    let in_a_row = read(run).iter().rev().take_while(|start| start.step == step).count();
    if in_a_row < PATIENCE { Ok(()) } else { Err(no_progress(run, step, in_a_row)) }
}

/// Records a resume from `step`, and moves the previous attempt's failure files to `log/`, so that
/// those at the top of the folder are of the newest attempt.
///
/// # Errors
/// [`Error::Storage`].
pub fn note(run: &Path, step: u64) -> Result<()> {
    let mut starts = read(run);
    starts.push(Start {
        step,
        time: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
    });
    write(run, &starts)?;
    archive_failures(run, starts.len())
}

/// Takes the newest record back.
///
/// # Errors
/// [`Error::Storage`].
pub fn forget(run: &Path) -> Result<()> {
    let mut starts = read(run);
    starts.pop();
    write(run, &starts)
}

fn write(run: &Path, starts: &[Start]) -> Result<()> {
    let text = serde_json::to_string_pretty(starts).expect("texts and numbers are JSON") + "\n";
    replace_file(&run.join(FILE), |file| file.write_all(text.as_bytes()))
}

/// An unreadable list is treated as empty, so that it never prevents a resume.
fn read(run: &Path) -> Vec<Start> {
    fs::read(run.join(FILE))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

fn no_progress(run: &Path, step: u64, in_a_row: usize) -> Error {
    let last = newest_failure(run).map_or_else(
        || "none left a failure file".into(),
        |Failure { code, name, rank, message, .. }| {
            format!("the last failure was {name} (code {code}) on rank {rank}: {message}")
        },
    );
    let run_text = run.display();
    let what = format!(
        "{in_a_row} starts in a row went on from step {step} and none saved a newer checkpoint; {last}; \
         mend the cause, then start with --resume {run_text}"
    );
    Error::NoProgress { path: run.into(), what }
}

/// Returns the last attempt's failure files, which are at the top of the run folder.
fn failure_files(run: &Path) -> Vec<PathBuf> {
    let is_one = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("failure-") && name.ends_with(".json")
    };
    let entries = fs::read_dir(run).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_one).collect();
    paths.sort();
    paths
}

/// Returns the latest failure that is not merely a lack of progress.
pub fn newest_failure(run: &Path) -> Option<Failure> {
    let read = |path: PathBuf| serde_json::from_slice::<Failure>(&fs::read(path).ok()?).ok();
    let own = Error::NoProgress { path: run.into(), what: String::new() };
    let found = failure_files(run)
        .into_iter()
        .filter_map(read)
        .filter(|failure| failure.name != own.name());
    found.max_by(|a, b| a.time.total_cmp(&b.time))
}

/// Renames `failure-3.json` to `log/failure-3.start-2.json`, for failures that start number 2
/// found. Number 0 is the start of a new run.
///
/// # Errors
/// [`Error::Storage`].
pub fn archive_failures(run: &Path, start: usize) -> Result<()> {
    let log = run.join("log");
    for path in failure_files(run) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let kept = log.join(format!("{name}.start-{start}.json"));
        fs::create_dir_all(&log)
            .and_then(|()| fs::rename(&path, &kept))
            .map_err(Error::storage(&path, "move to log/"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(run: &Path, rank: usize, name: &str, time: f64) {
        let text = serde_json::json!({ "code": 40, "name": name, "rank": rank, "message": "17 non-finite values", "time": time });
        fs::write(run.join(format!("failure-{rank}.json")), text.to_string()).unwrap();
    }

    fn start(run: &Path, step: u64) -> Result<()> {
        guard(run, step).and_then(|()| note(run, step))
    }

    #[test]
    fn the_third_start_in_a_row_from_one_step_is_refused_with_the_last_failure() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        start(run, 5).unwrap();
        start(run, 5).unwrap();
        fail(run, 0, "PEER", 1.0);
        fail(run, 3, "DATA", 2.0);
        fail(run, 1, "NO_PROGRESS", 3.0);
        let error = start(run, 5).unwrap_err();
        assert_eq!((error.exit_code(), error.name()), (43, "NO_PROGRESS"));
        let text = error.to_string();
        assert!(
            text.contains(
                "2 starts in a row went on from step 5 and none saved a newer checkpoint"
            ),
            "{text}"
        );
        assert!(
            text.contains("the last failure was DATA (code 40) on rank 3: 17 non-finite values"),
            "{text}"
        );
        assert!(text.ends_with(&format!("start with --resume {}", run.display())), "{text}");
        assert_eq!(failure_files(run).len(), 3, "a start that is refused moves nothing");
        assert_eq!(start(run, 5).unwrap_err().exit_code(), 43, "and the next is no different");
        start(run, 10).unwrap();
    }

    #[test]
    fn a_newer_checkpoint_makes_it_start_again() {
        let run = tempfile::tempdir().unwrap();
        [5, 5, 10, 10, 5, 5, 15].into_iter().for_each(|step| start(run.path(), step).unwrap());
    }

    #[test]
    fn a_list_that_cannot_be_read_keeps_no_run_from_going_on() {
        let run = tempfile::tempdir().unwrap();
        fs::write(run.path().join(FILE), "[{").unwrap();
        start(run.path(), 5).unwrap();
    }

    #[test]
    fn failures_of_earlier_attempts_go_to_the_log_and_none_is_lost() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        for step in [5, 10] {
            fail(run, 2, "DATA", 1.0);
            start(run, step).unwrap();
        }
        assert!(failure_files(run).is_empty());
        assert!(
            [1, 2]
                .iter()
                .all(|start| run.join(format!("log/failure-2.start-{start}.json")).exists())
        );
    }
}
