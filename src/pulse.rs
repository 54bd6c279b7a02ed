//! The state of this process for messages: its rank, the step, the phase, the stage that computes,
//! and the number of collectives that the step has started.
//!
//! The thread that does the work records its progress here, outside of any collective; messages,
//! failure files and the watchdog read it. One process is one rank, so the state is global. In a
//! world of threads, which is for tests, it is that of the thread that wrote last.

use std::cell::Cell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::phase::Phase;

/// The state at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pulse {
    /// The step under way, counted from 1; 0 before the first.
    pub step: u64,
    pub phase: Phase,
    /// Index of the model's stage that computes; `None` while no stage does.
    pub stage: Option<usize>,
    /// Collectives that the step has started.
    pub collectives: u64,
    /// Time since any of these last changed.
    pub age: Duration,
}

impl fmt::Display for Pulse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} phase {}", self.step, self.phase.word())?;
        if self.collectives > 0 {
            write!(f, "#{}", self.collectives)?;
        }
        match self.stage {
            Some(stage) => write!(f, " stage {}", StageLabel(stage)),
            None => Ok(()),
        }
    }
}

/// A stage's index and, in parentheses, its name if the model is known.
struct StageLabel(usize);

impl fmt::Display for StageLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match stage_name(self.0) {
            Some(name) => write!(f, "{} ({name})", self.0),
            None => write!(f, "{}", self.0),
        }
    }
}

static RANK: AtomicUsize = AtomicUsize::new(0);
static WORLD_SIZE: AtomicUsize = AtomicUsize::new(1);
static STEP: AtomicU64 = AtomicU64::new(0);
static FIRST_STEP: AtomicU64 = AtomicU64::new(0);
static PHASE: AtomicU8 = AtomicU8::new(Phase::Launch as u8);
/// Index of the stage that computes, or [`NO_STAGE`].
static STAGE: AtomicUsize = AtomicUsize::new(NO_STAGE);
const NO_STAGE: usize = usize::MAX;
/// Names of the model's stages, in their order.
static STAGE_NAMES: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// Milliseconds that the last save took.
static LAST_SAVE: AtomicU64 = AtomicU64::new(0);
static COLLECTIVES: AtomicU64 = AtomicU64::new(0);
/// Milliseconds from the first call of [`began`] to the last change.
static MOVED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The phase of a thread that works beside the run's own.
    static BESIDE: Cell<Option<Phase>> = const { Cell::new(None) };
}

/// Called at the start of each phase.
static LISTENER: OnceLock<fn(Phase)> = OnceLock::new();

/// The moment from which this process counts its milliseconds.
fn began() -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    *BEGAN.get_or_init(Instant::now)
}

fn moved() {
    MOVED.store(began().elapsed().as_millis() as u64, Relaxed);
}

/// Sets the rank of this process and the number of ranks.
pub fn set_rank(rank: usize, world_size: usize) {
    RANK.store(rank, Relaxed);
    WORLD_SIZE.store(world_size, Relaxed);
}

/// Rank of this process; 0 until it is known.
pub fn rank() -> usize {
    RANK.load(Relaxed)
}

/// Number of ranks; 1 until it is known.
pub fn world_size() -> usize {
    WORLD_SIZE.load(Relaxed)
}

/// True for the rank that prints and writes for the whole run.
pub fn is_root(rank: usize) -> bool {
    rank == 0
}

/// Starts step `step`, counted from 1.
pub fn begin_step(step: u64) {
    // Only the first call finds zero; later ones leave the value.
    let _ = FIRST_STEP.compare_exchange(0, step, Relaxed, Relaxed);
    STEP.store(step, Relaxed);
    COLLECTIVES.store(0, Relaxed);
    moved();
}

/// The first step that this process ran; 0 before it.
pub fn first_step() -> u64 {
    FIRST_STEP.load(Relaxed)
}

/// Records the duration of a save, from its copy to its commit.
pub fn saved(took: Duration) {
    LAST_SAVE.store(took.as_millis() as u64, Relaxed);
}

/// Duration of the last save of this process; zero before it.
pub fn last_save() -> Duration {
    Duration::from_millis(LAST_SAVE.load(Relaxed))
}

/// Registers a function to be called at the start of each phase. The first registration counts.
pub fn on_enter(listener: fn(Phase)) {
    LISTENER.get_or_init(|| listener);
}

/// Starts a phase of the run's own thread, and calls the listener.
pub fn enter(phase: Phase) {
    PHASE.store(phase as u8, Relaxed);
    leave_stages();
    if let Some(listener) = LISTENER.get() {
        listener(phase);
    }
}

/// Names the stages of the model that computes, in their order.
pub fn name_stages(names: Vec<String>) {
    *STAGE_NAMES.lock().unwrap_or_else(PoisonError::into_inner) = names;
}

/// Name of a stage; `None` before there is a model. Never blocks, because a thread that failed
/// while it held the lock may ask.
pub fn stage_name(stage: usize) -> Option<String> {
    STAGE_NAMES.try_lock().ok()?.get(stage).cloned()
}

/// Starts the computation of a stage, forward or backward.
pub fn enter_stage(stage: usize) {
    STAGE.store(stage, Relaxed);
    moved();
}

/// Records that no stage computes any more.
pub fn leave_stages() {
    STAGE.store(NO_STAGE, Relaxed);
    moved();
}

/// Makes messages of this thread, which works beside the run's own, name `phase` and no stage.
pub fn work_beside(phase: Phase) {
    BESIDE.set(Some(phase));
}

/// Counts a collective that starts.
pub fn begin_collective() {
    COLLECTIVES.fetch_add(1, Relaxed);
    moved();
}

/// Records progress within a long phase.
pub fn still_at_work() {
    moved();
}

static READING: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Records the file that data are being read from, on any thread.
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

/// Returns the state of this process now.
pub fn now() -> Pulse {
    let moved = Duration::from_millis(MOVED.load(Relaxed));
    let (step, age) = (STEP.load(Relaxed), began().elapsed().saturating_sub(moved));
    if let Some(phase) = BESIDE.get() {
        return Pulse { step, phase, stage: None, collectives: 0, age };
    }
    Pulse {
        step,
        phase: Phase::numbered(PHASE.load(Relaxed)).expect("only phases are stored"),
        stage: Some(STAGE.load(Relaxed)).filter(|stage| *stage != NO_STAGE),
        collectives: COLLECTIVES.load(Relaxed),
        age,
    }
}

/// Name of this machine.
pub fn host() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

/// This process in a message: `rank 3/8 host n12 step 1207 phase reduce#7`, followed by
/// ` stage 7 (single_transformer_blocks.3)` while a stage computes; without the step before the
/// first.
pub fn whereabouts() -> String {
    let (rank, world_size, host, now) = (rank(), world_size(), host(), now());
    let step = if now.step > 0 { format!(" {now}") } else { String::new() };
    format!("rank {rank}/{world_size} host {host}{step}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_reads_as_in_messages() {
        let pulse = Pulse {
            step: 12,
            phase: Phase::Reduce,
            stage: None,
            collectives: 7,
            age: Duration::ZERO,
        };
        assert_eq!(pulse.to_string(), "step 12 phase reduce#7");
        assert_eq!(Pulse { collectives: 0, ..pulse }.to_string(), "step 12 phase reduce");
        let far = Pulse { stage: Some(1 << 30), ..pulse };
        assert_eq!(far.to_string(), "step 12 phase reduce#7 stage 1073741824");
    }

    #[test]
    fn a_thread_beside_the_runs_own_names_its_phase_and_no_stage() {
        let beside = std::thread::spawn(|| {
            work_beside(Phase::Read);
            enter_stage(3);
            let now = now();
            (now.phase, now.stage, now.collectives)
        });
        assert_eq!(beside.join().expect("no panic"), (Phase::Read, None, 0));
    }
}
