//! The last words of a process: one line on standard error, and its twin for programs in the run folder.

use std::backtrace::Backtrace;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::error::{BUG, one_line};
use crate::pulse;

/// `failure-<rank>.json`.
#[derive(Serialize)]
struct Failure<'f> {
    code: i32,
    name: &'f str,
    rank: usize,
    world_size: usize,
    host: String,
    pid: u32,
    step: u64,
    phase: &'static str,
    /// Collectives that the step had begun.
    collective: u64,
    message: &'f str,
    /// Of a panic.
    backtrace: Option<String>,
    /// Seconds since 1970, UTC.
    time: f64,
}

/// Where the file goes, once there is a run folder.
static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);
/// Whether somebody has begun to say why this process ends, and whether it was said.
static BEGUN: AtomicBool = AtomicBool::new(false);
static SAID: AtomicBool = AtomicBool::new(false);
/// How long the words of the first cause may take: a backtrace, a file, a line.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether this rank was chosen to say what all ranks know of.
static SPEAKS: AtomicBool = AtomicBool::new(false);

/// All ranks agreed that this one says why they end.
pub fn speaks_for_all() {
    SPEAKS.store(true, Ordering::SeqCst);
}

/// Whether [`speaks_for_all`] was called: the others wait for this rank's words, which must not wait for theirs.
pub fn is_speaker() -> bool {
    SPEAKS.load(Ordering::SeqCst)
}

/// From now on a failure leaves a file in `folder`.
pub fn keep_in(folder: &Path) {
    *FOLDER.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder.into());
}

/// Says why this process ends. Only the first cause of a process is said: what fails on the way out is its consequence, and comes
/// back from here once the first one was said.
pub fn tell(code: i32, name: &str, what: &str) {
    if BEGUN.swap(true, Ordering::SeqCst) {
        return wait_until_said();
    }
    let what = one_line(what);
    let full_stop = if what.ends_with(['.', '?']) { "" } else { "." };
    let message = format!("fm-dist: error {name} {}: {what}{full_stop} exit {code}", pulse::whereabouts());
    // The file first: a launcher may end this process as soon as it reads the line.
    write_file(code, name, &what);
    // One write, so that a launcher that joins the ranks' outputs cannot tear the line; a closed pipe changes nothing.
    let _ = std::io::stderr().write_all(format!("{message}\n").as_bytes());
    SAID.store(true, Ordering::SeqCst);
}

/// Who comes second ends the process as well, and must not do so while the first one speaks; but not wait for ever, where a pipe is
/// full.
fn wait_until_said() {
    let limit = Instant::now() + PATIENCE;
    while !SAID.load(Ordering::SeqCst) && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Best effort: a full disk must not hide the message.
fn write_file(code: i32, name: &str, message: &str) {
    let Ok(folder) = FOLDER.try_lock() else { return };
    let Some(folder) = folder.as_deref() else { return };
    let ((rank, world_size), now) = (pulse::place(), pulse::now());
    let failure = Failure {
        code,
        name,
        rank,
        world_size,
        host: pulse::host(),
        pid: std::process::id(),
        step: now.step,
        phase: now.phase.word(),
        collective: now.collectives,
        message,
        backtrace: (code == BUG).then(|| Backtrace::force_capture().to_string()),
        time: SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64()),
    };
    let text = serde_json::to_string_pretty(&failure).expect("numbers and texts are JSON") + "\n";
    let _ = fs::write(folder.join(file_name(rank)), text);
}

/// Name of a rank's file.
pub fn file_name(rank: usize) -> String {
    format!("failure-{rank}.json")
}
