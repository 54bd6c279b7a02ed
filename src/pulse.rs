//! Where this process stands: its rank, the step, the phase, how many collectives the step has
//! begun.
//!
//! Whoever does the work writes it down here, outside of any collective; whoever must say where the
//! work stopped reads it: messages, failure files, the watchdog. One process is one rank, so it is
//! kept once for the process: in a world of threads, which is for tests, it is that of whichever
//! thread wrote last.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::phase::Phase;

/// A moment of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pulse {
    /// The step under way, counted from 1; 0 before the first.
    pub step: u64,
    pub phase: Phase,
    /// Collectives that the step has begun.
    pub collectives: u64,
    /// Time since any of these last changed.
    pub age: Duration,
}

impl fmt::Display for Pulse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} phase {}", self.step, self.phase.word())?;
        if self.collectives > 0 { write!(f, "#{}", self.collectives) } else { Ok(()) }
    }
}

static RANK: AtomicUsize = AtomicUsize::new(0);
static WORLD_SIZE: AtomicUsize = AtomicUsize::new(1);
static STEP: AtomicU64 = AtomicU64::new(0);
static FIRST_STEP: AtomicU64 = AtomicU64::new(0);
static PHASE: AtomicU8 = AtomicU8::new(Phase::Launch as u8);
/// Milliseconds that the last save took.
static LAST_SAVE: AtomicU64 = AtomicU64::new(0);
static COLLECTIVES: AtomicU64 = AtomicU64::new(0);
/// Milliseconds from the first call of [`began`] to the last change.
static MOVED: AtomicU64 = AtomicU64::new(0);

/// Told of each phase that begins.
static LISTENER: OnceLock<fn(Phase)> = OnceLock::new();

/// When this process began to keep its pulse.
fn began() -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    *BEGAN.get_or_init(Instant::now)
}

fn moved() {
    MOVED.store(began().elapsed().as_millis() as u64, Relaxed);
}

/// This process is `rank` of `world_size`.
pub fn take_place(rank: usize, world_size: usize) {
    RANK.store(rank, Relaxed);
    WORLD_SIZE.store(world_size, Relaxed);
}

/// Rank and number of ranks; 0 of 1 until that is known.
pub fn place() -> (usize, usize) {
    (RANK.load(Relaxed), WORLD_SIZE.load(Relaxed))
}

/// True for the rank that speaks and writes for the whole run.
pub fn is_root(rank: usize) -> bool {
    rank == 0
}

/// Begins step `step`, counted from 1.
pub fn begin_step(step: u64) {
    // Only the first one finds the zero; what is there already stays.
    let _ = FIRST_STEP.compare_exchange(0, step, Relaxed, Relaxed);
    STEP.store(step, Relaxed);
    COLLECTIVES.store(0, Relaxed);
    moved();
}

/// The step that this start of the run began with; 0 before it.
pub fn first_step() -> u64 {
    FIRST_STEP.load(Relaxed)
}

/// A save is over that took so long, from its copy to its commit.
pub fn saved(took: Duration) {
    LAST_SAVE.store(took.as_millis() as u64, Relaxed);
}

/// How long the last save of this start took; zero before it.
pub fn last_save() -> Duration {
    Duration::from_millis(LAST_SAVE.load(Relaxed))
}

/// Calls `listener` at each phase that begins from now on; the first one that is given stays.
pub fn on_enter(listener: fn(Phase)) {
    LISTENER.get_or_init(|| listener);
}

/// Begins a phase of the run's own thread, and tells the listener.
pub fn enter(phase: Phase) {
    PHASE.store(phase as u8, Relaxed);
    moved();
    if let Some(listener) = LISTENER.get() {
        listener(phase);
    }
}

/// Begins a collective.
pub fn begin_collective() {
    COLLECTIVES.fetch_add(1, Relaxed);
    moved();
}

/// A long phase goes on, e.g. to the next stage of a model: says that it has not stopped.
pub fn still_at_work() {
    moved();
}

static READING: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Data are read from this file, on whatever thread.
pub fn read_from(path: &Path) {
    *READING.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.into());
}

/// The file that was read from last.
pub fn reading() -> Option<String> {
    READING
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_ref()
        .map(|path| path.display().to_string())
}

/// Where this process stands now.
pub fn now() -> Pulse {
    let moved = Duration::from_millis(MOVED.load(Relaxed));
    Pulse {
        step: STEP.load(Relaxed),
        phase: Phase::numbered(PHASE.load(Relaxed)).expect("only phases are stored"),
        collectives: COLLECTIVES.load(Relaxed),
        age: began().elapsed().saturating_sub(moved),
    }
}

/// Name of this machine.
pub fn host() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

/// This process for a message: `rank 3/8 host n12 step 1207 phase reduce#7`; without the step
/// before the first.
pub fn whereabouts() -> String {
    let ((rank, world_size), host, now) = (place(), host(), now());
    let step = if now.step > 0 { format!(" {now}") } else { String::new() };
    format!("rank {rank}/{world_size} host {host}{step}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_reads_as_in_messages() {
        let pulse = Pulse { step: 12, phase: Phase::Reduce, collectives: 7, age: Duration::ZERO };
        assert_eq!(pulse.to_string(), "step 12 phase reduce#7");
        assert_eq!(Pulse { collectives: 0, ..pulse }.to_string(), "step 12 phase reduce");
    }
}
