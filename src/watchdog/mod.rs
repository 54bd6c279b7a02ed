//! Ends a run that stands still, and says whom it waits for.
//!
//! Each rank has a thread that watches its own pulse and beats to rank 0 outside of all collectives
//! (`beats.rs`). Where nobody moves for longer than the phase may take (`settings.rs`), it says who
//! is missing (`verdict.rs`) and ends the world. It never trusts that waiting collectives return,
//! that a launcher notices, or that a clock ran while the process was stopped.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod beats;
mod settings;
mod verdict;
mod word;

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use crate::collective::{self, Collective, broadcast_text};
use crate::error::{Error, Result};
use crate::failure;
use crate::median::{Middle, median};
use crate::pulse::{self, Pulse};
use beats::{Line, Meeting, Roll};
use settings::Pace;
pub use settings::WatchdogSettings;
use verdict::Witness;

/// Steps whose median says how long a step takes.
const SEEN_STEPS: usize = 50;

/// What the watching thread and the run's own thread share.
#[derive(Default)]
struct Shared {
    settings: Mutex<WatchdogSettings>,
    /// None before the ranks have met, and for good in a world of one.
    line: Mutex<Option<Line>>,
}

/// Watches this process from now to its end.
pub struct Watchdog {
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchdog {
    /// Starts to watch.
    ///
    /// # Errors
    /// [`Error::Environment`] if no thread can be started.
    pub fn start(settings: WatchdogSettings) -> Result<Self> {
        failure::be_patient(Duration::from_secs_f64(settings.finalize_seconds));
        let shared = Arc::new(Shared { settings: Mutex::new(settings), line: Mutex::default() });
        let watched = shared.clone();
        let thread = Builder::new().name("watchdog".into()).spawn(move || watch(&watched));
        thread.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
        Ok(Watchdog { shared })
    }

    /// From now on these settings hold.
    pub fn follow(&self, settings: WatchdogSettings) {
        failure::be_patient(Duration::from_secs_f64(settings.finalize_seconds));
        *lock(&self.shared.settings) = settings;
    }

    /// Opens the line over which ranks beat, and the desk at which they ask for the word.
    ///
    /// # Errors
    /// [`Error::Environment`] if no socket can be opened; what the broadcast returns.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn meet(&self, world: &dyn Collective) -> Result<()> {
        let (rank, world_size) = (world.rank(), world.world_size());
        if world_size < 2 {
            // A port that nobody needs stays closed.
            return Ok(());
        }
        if pulse::is_root(rank) {
            let (hub, mut meeting) =
                Line::hub(world_size, RandomState::new().hash_one(std::process::id()))?;
            // Before the others know of it: one that never comes is missed by name.
            *lock(&self.shared.line) = Some(hub);
            meeting.desk = word::open_desk(world_size, meeting.token())?;
            let meeting = serde_json::to_string(&meeting).expect("texts and numbers are JSON");
            return broadcast_text(world, &meeting, 0).map(drop);
        }
        let meeting = broadcast_text(world, "", 0)?;
        let meeting: Meeting =
            serde_json::from_str(&meeting).expect("rank 0 sent where it can be met");
        word::ask_at(&meeting);
        let mut spoke = Line::spoke(&meeting)?;
        // At once: a rank that stops within its first second is missed by host, too.
        spoke.beat(&pulse::now());
        *lock(&self.shared.line) = Some(spoke);
        Ok(())
    }
}

/// Time in which a pulse did not move, as far as this thread was awake to see it: a process that
/// was stopped, or a machine that slept, does not make up for it all at once.
struct Stillness {
    seen: Pulse,
    still: Duration,
    looked: Instant,
}

impl Stillness {
    fn since(now: Pulse) -> Self {
        Stillness { seen: now, still: Duration::ZERO, looked: Instant::now() }
    }

    fn look(&mut self, now: Pulse, interval: Duration) -> Duration {
        let slept = std::mem::replace(&mut self.looked, Instant::now()).elapsed().min(3 * interval);
        let has_moved = now.age < self.seen.age + slept / 2 || now.step != self.seen.step;
        self.still = if has_moved { now.age.min(slept) } else { self.still + slept };
        self.seen = now;
        self.still
    }
}

/// How long steps take, as seen from beside them.
#[derive(Default)]
struct Steps {
    last: Option<(u64, Instant)>,
    seconds: VecDeque<f64>,
}

impl Steps {
    fn look(&mut self, step: u64) {
        if step == 0 {
            return;
        }
        match self.last {
            Some((before, _)) if before == step => return,
            Some((before, when)) => self.seconds.push_back(
                when.elapsed().as_secs_f64() / step.saturating_sub(before).max(1) as f64,
            ),
            None => (),
        }
        self.last = Some((step, Instant::now()));
        if self.seconds.len() > SEEN_STEPS {
            self.seconds.pop_front();
        }
    }

    /// In seconds; zero before the first was seen.
    fn median(&self) -> f64 {
        median(self.seconds.iter().copied(), Middle::Upper).unwrap_or_default()
    }
}

fn watch(shared: &Shared) {
    let (mut stillness, mut steps) = (Stillness::since(pulse::now()), Steps::default());
    loop {
        let settings = lock(&shared.settings).clone();
        let interval = settings.beat_interval();
        std::thread::sleep(interval);
        let now = pulse::now();
        steps.look(now.step);
        let still = stillness.look(now, interval);
        let roll = lock(&shared.line).as_mut().map(|line| line.beat(&now)).unwrap_or_default();
        let (first_step, last_save) = (pulse::first_step(), pulse::last_save().as_secs_f64());
        let limit =
            settings.limit(&now, Pace { first_step, step_median: steps.median(), last_save });
        let (rank, world_size) = pulse::place();
        // Somebody else may still be at work that this rank waits for.
        let nobody_moves = roll.still.is_none_or(|others| others > limit);
        let hub_is_gone = roll.silence > quiet(interval);
        if settings.enabled && still > limit + turn(rank, hub_is_gone) && nobody_moves {
            let (host, reading) = (pulse::host(), beats::reading(&now));
            if hub_is_gone {
                // This was its turn.
                failure::ask_nobody();
            }
            end(
                &Witness {
                    rank,
                    world_size,
                    host: &host,
                    now: &now,
                    still,
                    quiet: quiet(interval),
                    reading,
                },
                &roll,
            );
        }
    }
}

/// Silence after which a rank counts as gone: some beats may be lost, or late on a busy machine.
fn quiet(interval: Duration) -> Duration {
    5 * interval
}

/// How much later than rank 0 a rank speaks, so that one of them does: rank 0, which knows most, or
/// where it is gone one of the next. A world that is being ended takes a second or two to be gone.
fn turn(rank: usize, hub_is_gone: bool) -> Duration {
    let doublings = (usize::BITS - rank.leading_zeros()).saturating_sub(1);
    match rank {
        0 => Duration::ZERO,
        _ if hub_is_gone => Duration::from_millis(500 + 2000 * u64::from(doublings)),
        _ => Duration::from_secs(5),
    }
}

fn end(witness: &Witness<'_>, roll: &Roll) -> ! {
    let verdict = witness.verdict(roll);
    collective::end(verdict.code, verdict.name, &verdict.what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phase::Phase;

    fn at(step: u64, age: f64) -> Pulse {
        Pulse { step, phase: Phase::Forward, collectives: 0, age: Duration::from_secs_f64(age) }
    }

    #[test]
    fn a_process_that_was_stopped_has_not_stood_still() {
        let interval = Duration::from_millis(10);
        let mut stillness = Stillness::since(at(1, 0.0));
        let after_a_stop = stillness.look(at(1, 1000.0), interval);
        assert!(after_a_stop <= 3 * interval, "{after_a_stop:?}");
    }

    #[test]
    fn a_pulse_that_moves_begins_anew() {
        let interval = Duration::from_millis(10);
        let mut stillness = Stillness::since(at(1, 0.0));
        stillness.still = Duration::from_secs(100);
        assert!(stillness.look(at(2, 0.0), interval) <= interval);
    }

    #[test]
    fn the_median_is_of_the_last_steps() {
        let mut steps = Steps::default();
        assert_eq!(steps.median(), 0.0);
        steps.seconds = VecDeque::from([9.0, 1.0, 2.0]);
        assert_eq!(steps.median(), 2.0);
    }

    #[test]
    fn rank_0_speaks_first_and_no_rank_waits_for_long() {
        assert_eq!(turn(0, false), Duration::ZERO);
        assert!(
            turn(1, true) > Duration::ZERO
                && turn(1, true) < turn(2, true)
                && turn(4095, true) < Duration::from_secs(30)
        );
        assert_eq!(turn(1, false), turn(7, false), "rank 0 is there to speak");
    }

    #[test]
    fn ranks_that_beat_know_of_one_another() {
        let (mut hub, meeting) = Line::hub(3, 7).unwrap();
        let mut spoke = Line::spoke(&meeting).unwrap();
        let began = Instant::now();
        // The spoke of this process says that it is rank 0 as well, so the hub hears itself; rank 1
        // and 2 stay unknown.
        let roll = loop {
            spoke.beat(&at(4, 0.0));
            let heard = hub.beat(&at(5, 0.0));
            assert_eq!(heard.unknown, [1, 2]);
            let roll = spoke.beat(&at(4, 0.0));
            if !roll.unknown.is_empty() {
                break roll;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "no answer");
        };
        assert_eq!(roll.unknown, [1, 2]);
        assert_eq!(roll.standings[0].pulse.step, 5);
    }
}
