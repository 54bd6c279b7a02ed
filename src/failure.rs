//! The message with which a world ends: one line on standard error, and the same as JSON in the run
//! folder. `failure/device.rs` and `failure/memory.rs` add to a library's words what else is known.
//!
//! One rank, the *speaker*, prints the reason for all. A rank that fails asks rank 0, outside of
//! any collective, to become the speaker; rank 0 appoints the first one that asks, and the others
//! wait until the speaker has ended the world. Time decides only if rank 0 is gone or does not
//! answer.

mod device;
mod memory;

use std::backtrace::Backtrace;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::error::{BUG, Error, STOPPED, one_line};
use crate::fault;
use crate::phase::Phase;
use crate::pulse;
pub use memory::{MemoryChange, MemoryForecast, set_forecast};

/// Content of `failure-<rank>.json`.
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
    /// Index and name of the stage that computed; `None` where none did.
    stage: Option<usize>,
    stage_name: Option<String>,
    /// Collectives that the step had started.
    collective: u64,
    message: &'f str,
    /// Backtrace of a panic; otherwise `None`.
    backtrace: Option<String>,
    /// Seconds since 1970, UTC.
    time: f64,
}

/// Folder of the failure file; `None` before there is a run folder.
static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Exit code of the first failure of this process. The process exits with it, whatever else fails
/// during shutdown.
static CAUSE: OnceLock<i32> = OnceLock::new();

/// Set once the message of the first failure has been printed.
static PRINTED: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

/// Milliseconds to wait for the speaker, see [`set_timeout`].
static TIMEOUT: AtomicU64 = AtomicU64::new(60_000);

/// On rank 0: the rank that it has appointed.
static SPEAKER: Mutex<Option<usize>> = Mutex::new(None);

/// Asks rank 0 for the speaker. With a rank given, this rank asks to replace it. Returns the
/// speaker, or `None` if rank 0 does not answer.
type Ask = Box<dyn Fn(Option<usize>) -> Option<usize> + Send + Sync>;

static ASK: OnceLock<Ask> = OnceLock::new();

/// See [`skip_arbitration`].
static SKIPS_ARBITRATION: AtomicBool = AtomicBool::new(false);

/// Makes failures from now on leave a file in `folder`.
pub fn set_folder(folder: &Path) {
    *FOLDER.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder.into());
}

/// Sets the time that the speaker may take to print the reason and to end the world, before another
/// rank does both.
pub fn set_timeout(limit: Duration) {
    TIMEOUT.store(limit.as_millis() as u64, Ordering::Relaxed);
}

/// See [`set_timeout`].
pub fn timeout() -> Duration {
    Duration::from_millis(TIMEOUT.load(Ordering::Relaxed))
}

/// Sets the function by which this rank asks for the speaker before it prints, so that only one of
/// many failing ranks does. The first call counts.
pub fn set_arbiter(ask: impl Fn(Option<usize>) -> Option<usize> + Send + Sync + 'static) {
    ASK.get_or_init(|| Box::new(ask));
}

/// Lets this rank print without asking, for ranks that have found rank 0 gone and have already
/// taken turns.
pub fn skip_arbitration() {
    SKIPS_ARBITRATION.store(true, Ordering::SeqCst);
}

/// Appoints `rank` if there is no speaker, or if the speaker is the rank that it wants to replace;
/// returns the speaker. Called on rank 0 only.
pub fn appoint_speaker(rank: usize, instead_of: Option<usize>) -> usize {
    let mut speaker = SPEAKER.lock().unwrap_or_else(PoisonError::into_inner);
    appointed(&mut speaker, rank, instead_of)
}

fn appointed(speaker: &mut Option<usize>, rank: usize, instead_of: Option<usize>) -> usize {
    if *speaker == instead_of {
        *speaker = None;
    }
    *speaker.get_or_insert(rank)
}

/// Adds to an error of a device or of its memory what the library's words leave out: the state of
/// the device, the memory that is free and that was predicted, and a configuration that takes less.
/// Returns any other error unchanged. Takes at most a second.
pub fn explained(error: Error) -> Error {
    match error {
        Error::Device { what } => Error::Device { what: device::explain(&what) },
        Error::OutOfMemory { what, shortage } => {
            Error::OutOfMemory { what: memory::explain(&what, shortage), shortage }
        }
        other => other,
    }
}

/// Records the exit code of a failure. Returns `true` if it is the first one of this process. When
/// several threads fail, the first one's code counts: the others may have failed because of it.
pub fn record_cause(code: i32) -> bool {
    CAUSE.set(code).is_ok()
}

/// Exit code of the first failure; `code` if there is none yet.
pub fn first_code(code: i32) -> i32 {
    *CAUSE.get_or_init(|| code)
}

/// Prints the reason why this process ends if this rank is the speaker; otherwise returns the
/// speaker. Only the first failure of a process is printed: later ones are its consequences, and
/// this returns for them once the first one has been printed.
pub fn report(code: i32, name: &str, what: &str) -> Option<usize> {
    if !record_cause(code) {
        wait_until_printed();
        return None;
    }
    let other = other_speaker(None);
    if other.is_none() {
        print(code, name, what);
    }
    other
}

/// Does as [`report`] for the first failure of this process, after `speaker` did not end the world
/// in time.
pub fn report_instead_of(speaker: usize, code: i32, name: &str, what: &str) {
    if ASK.get().is_some() && other_speaker(Some(speaker)).is_none() {
        print(code, name, what);
    }
}

/// Returns the speaker if it is another rank. If rank 0 does not answer, ranks take turns by
/// number.
fn other_speaker(instead_of: Option<usize>) -> Option<usize> {
    let (rank, world_size) = (pulse::rank(), pulse::world_size());
    if world_size < 2 || SKIPS_ARBITRATION.load(Ordering::SeqCst) {
        return None;
    }
    match ASK.get().and_then(|ask| ask(instead_of)) {
        Some(speaker) => (speaker != rank).then_some(speaker),
        None => {
            wait_for_turn(rank);
            None
        }
    }
}

/// Time of one turn: many times what a message and the end of the world take to pass through the
/// launcher.
const TURN: Duration = Duration::from_secs(2);

/// Leaves lower ranks the time to print and to end the world: a few seconds for rank 1, and
/// [`TURN`] more with each doubling of the rank.
fn wait_for_turn(rank: usize) {
    std::thread::sleep(TURN * (usize::BITS - rank.leading_zeros()));
}

fn print(code: i32, name: &str, what: &str) {
    let start = Instant::now();
    fault::strike(Phase::Finalize);
    if pulse::world_size() > 1 && start.elapsed() > timeout() {
        // This process was suspended until now, and another rank has reported in its place.
        return;
    }
    let what = one_line(what);
    let full_stop = if what.ends_with(['.', '?']) { "" } else { "." };
    let kind = if code == STOPPED { "stopped".into() } else { format!("error {name}") };
    let message =
        format!("fm-dist: {kind} {}: {what}{full_stop} exit {code}", pulse::whereabouts());
    // One write, so that a launcher that merges the ranks' outputs cannot split the line. A closed
    // pipe changes nothing.
    let _ = std::io::stderr().write_all(format!("{message}\n").as_bytes());
    // The line is printed first: a backtrace takes long on a busy machine.
    if code != STOPPED {
        write_file(code, name, &what);
    }
    *PRINTED.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
    PRINTED.1.notify_all();
}

/// A second failing thread waits until the first has printed its message, but at most [`timeout`]:
/// stderr may be a full pipe.
pub fn wait_until_printed() {
    let printed = PRINTED.0.lock().unwrap_or_else(PoisonError::into_inner);
    drop(PRINTED.1.wait_timeout_while(printed, timeout(), |printed| !*printed));
}

/// Best effort: a full disk must not suppress the message.
fn write_file(code: i32, name: &str, message: &str) {
    let Ok(folder) = FOLDER.try_lock() else { return };
    let Some(folder) = folder.as_deref() else { return };
    let (rank, now) = (pulse::rank(), pulse::now());
    let failure = Failure {
        code,
        name,
        rank,
        world_size: pulse::world_size(),
        host: pulse::host(),
        pid: std::process::id(),
        step: now.step,
        phase: now.phase.word(),
        stage: now.stage,
        stage_name: now.stage.and_then(pulse::stage_name),
        collective: now.collectives,
        message,
        backtrace: (code == BUG).then(|| Backtrace::force_capture().to_string()),
        time: SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64()),
    };
    let text = serde_json::to_string_pretty(&failure).expect("numbers and texts are JSON") + "\n";
    let _ = fs::write(folder.join(file_name(rank)), text);
}

/// Name of a rank's failure file.
pub fn file_name(rank: usize) -> String {
    format!("failure-{rank}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_goes_to_who_asks_first_and_on_from_a_rank_that_did_not_use_it() {
        let mut speaker = None;
        assert_eq!([3, 0, 3, 7].map(|rank| appointed(&mut speaker, rank, None)), [3, 3, 3, 3]);
        assert_eq!(appointed(&mut speaker, 7, Some(5)), 3, "rank 5 never had it");
        assert_eq!(
            [7, 0].map(|rank| appointed(&mut speaker, rank, Some(3))),
            [7, 7],
            "two ranks give rank 3 up, one speaks"
        );
    }
}
