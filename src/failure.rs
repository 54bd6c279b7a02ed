//! The last words of a world: one line on standard error, and its twin for programs in the run
//! folder.
//!
//! One rank says why all of them end. Who fails asks rank 0 for the word, beside all collectives,
//! and the first one who asks gets it; the others wait until that one has ended the world. No clock
//! decides, unless rank 0 is gone or does not answer.

use std::backtrace::Backtrace;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::error::{BUG, STOPPED, one_line};
use crate::fault;
use crate::phase::Phase;
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

/// Exit code of the first cause that a thread of this process met: it is this process's, whatever
/// else fails on the way out.
static CAUSE: OnceLock<i32> = OnceLock::new();

/// Set once the words of the first cause have been said.
static SAID: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

/// Milliseconds for which the end of a world is waited for, see [`be_patient`].
static PATIENCE: AtomicU64 = AtomicU64::new(60_000);

/// Rank 0's book: the rank that has the word.
static SPEAKER: Mutex<Option<usize>> = Mutex::new(None);

/// Asks rank 0 for the word in place of the rank given, if any: the rank that has it, or `None`
/// without an answer.
type Ask = Box<dyn Fn(Option<usize>) -> Option<usize> + Send + Sync>;

static ASK: OnceLock<Ask> = OnceLock::new();

/// See [`ask_nobody`].
static ASKS_NOBODY: AtomicBool = AtomicBool::new(false);

/// From now on a failure leaves a file in `folder`.
pub fn keep_in(folder: &Path) {
    *FOLDER.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder.into());
}

/// Sets the time that a rank which has the word may take to say why the world ends, and to end it,
/// before another one does.
pub fn be_patient(limit: Duration) {
    PATIENCE.store(limit.as_millis() as u64, Ordering::Relaxed);
}

/// See [`be_patient`].
pub fn patience() -> Duration {
    Duration::from_millis(PATIENCE.load(Ordering::Relaxed))
}

/// From now on this rank asks by `ask` before it speaks, so that of many ranks that fail one
/// speaks. The first one stands.
pub fn ask_by(ask: impl Fn(Option<usize>) -> Option<usize> + Send + Sync + 'static) {
    ASK.get_or_init(|| Box::new(ask));
}

/// From now on this rank speaks without asking, for ranks that have found rank 0 gone and taken
/// turns already.
pub fn ask_nobody() {
    ASKS_NOBODY.store(true, Ordering::SeqCst);
}

/// Gives the word to `rank` if nobody has it, or if only the rank has that it wants to replace;
/// returns who has it. Rank 0 keeps the book.
pub fn give_word(rank: usize, instead_of: Option<usize>) -> usize {
    let mut speaker = SPEAKER.lock().unwrap_or_else(PoisonError::into_inner);
    given(&mut speaker, rank, instead_of)
}

fn given(speaker: &mut Option<usize>, rank: usize, instead_of: Option<usize>) -> usize {
    if *speaker == instead_of {
        *speaker = None;
    }
    *speaker.get_or_insert(rank)
}

/// Returns `true` if this is the first cause that this process meets, whose exit code is `code`. Of
/// several threads that find a reason to end, the first one's code counts: the others may see no
/// more than what it did.
pub fn begin(code: i32) -> bool {
    CAUSE.set(code).is_ok()
}

/// Exit code of the first cause; `code`, if there is none yet.
pub fn first_code(code: i32) -> i32 {
    *CAUSE.get_or_init(|| code)
}

/// Says why this process ends, if its rank has the word; returns the rank that has it otherwise.
/// Only the first cause of a process is said: what fails on the way out is its consequence, and
/// comes back from here once the first one was said.
pub fn tell(code: i32, name: &str, what: &str) -> Option<usize> {
    if !begin(code) {
        wait_until_said();
        return None;
    }
    let other = other_speaker(None);
    if other.is_none() {
        say(code, name, what);
    }
    other
}

/// Does as [`tell`] for the first cause of this process, after a rank that had the word did not end
/// the world.
pub fn tell_instead_of(speaker: usize, code: i32, name: &str, what: &str) {
    if ASK.get().is_some() && other_speaker(Some(speaker)).is_none() {
        say(code, name, what);
    }
}

/// The rank that has the word, if it is another one. Where rank 0 does not answer, lower ranks
/// speak first.
fn other_speaker(instead_of: Option<usize>) -> Option<usize> {
    let (rank, world_size) = pulse::place();
    if world_size < 2 || ASKS_NOBODY.load(Ordering::SeqCst) {
        return None;
    }
    match ASK.get().and_then(|ask| ask(instead_of)) {
        Some(speaker) => (speaker != rank).then_some(speaker),
        None => {
            give_way(rank);
            None
        }
    }
}

/// Time that a rank's message and the end of the world take on their way through the launcher, many
/// times over.
const TURN: Duration = Duration::from_secs(2);

/// Leaves the lower ranks the time to speak and to end the world: a few seconds at most for rank 1,
/// a few more with each doubling.
fn give_way(rank: usize) {
    std::thread::sleep(TURN * (usize::BITS - rank.leading_zeros()));
}

fn say(code: i32, name: &str, what: &str) {
    let given = Instant::now();
    fault::strike(Phase::Finalize);
    if pulse::place().1 > 1 && given.elapsed() > patience() {
        // A process that was stopped until now: another rank has spoken in its place.
        return;
    }
    let what = one_line(what);
    let full_stop = if what.ends_with(['.', '?']) { "" } else { "." };
    let kind = if code == STOPPED { "stopped".into() } else { format!("error {name}") };
    let message =
        format!("fm-dist: {kind} {}: {what}{full_stop} exit {code}", pulse::whereabouts());
    // One write, so that a launcher that joins the ranks' outputs cannot tear the line; a closed
    // pipe changes nothing.
    let _ = std::io::stderr().write_all(format!("{message}\n").as_bytes());
    // The line first: a backtrace takes long on a busy machine.
    if code != STOPPED {
        write_file(code, name, &what);
    }
    *SAID.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
    SAID.1.notify_all();
}

/// Who comes second ends the process as well, and must not do so while the first one speaks; but
/// not wait for ever, where a pipe is full.
fn wait_until_said() {
    let said = SAID.0.lock().unwrap_or_else(PoisonError::into_inner);
    drop(SAID.1.wait_timeout_while(said, patience(), |said| !*said));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_goes_to_who_asks_first_and_on_from_a_rank_that_did_not_use_it() {
        let mut speaker = None;
        assert_eq!([3, 0, 3, 7].map(|rank| given(&mut speaker, rank, None)), [3, 3, 3, 3]);
        assert_eq!(given(&mut speaker, 7, Some(5)), 3, "rank 5 never had it");
        assert_eq!(
            [7, 0].map(|rank| given(&mut speaker, rank, Some(3))),
            [7, 7],
            "two ranks give rank 3 up, one speaks"
        );
    }
}
