//! Ends a run that makes no progress, and names the ranks that it waits for.
//!
//! Each rank has a thread that watches the rank's own [`pulse`] and sends beats to rank 0, outside
//! of any collective (`beats.rs`). If no rank has made progress for longer than the phase may take
//! (`settings.rs`), it names the missing ranks (`verdict.rs`) and ends the world. It does not rely
//! on blocked collectives to return, on the launcher to notice, or on the clock while the process
//! was suspended. `arbiter.rs` lets rank 0 decide which failing rank prints the reason.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod arbiter;
mod beats;
mod settings;
mod verdict;

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
use beats::{Heartbeat, HubAddress, Overview};
use settings::Pace;
pub use settings::WatchdogSettings;
use verdict::Observer;

/// Number of the last steps over which the median step time is taken.
const SEEN_STEPS: usize = 50;

/// State that the watching thread shares with the run's own thread.
#[derive(Default)]
struct Shared {
    settings: Mutex<WatchdogSettings>,
    /// `None` until [`Watchdog::connect`], and always in a world of one.
    heartbeat: Mutex<Option<Heartbeat>>,
}

/// Watches this process from its creation to the end of the process.
pub struct Watchdog {
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchdog {
    /// Starts the watching thread.
    ///
    /// # Errors
    /// [`Error::Environment`] if no thread can be started.
    pub fn start(settings: WatchdogSettings) -> Result<Self> {
        failure::set_timeout(Duration::from_secs_f64(settings.finalize_seconds));
        let shared =
            Arc::new(Shared { settings: Mutex::new(settings), heartbeat: Mutex::default() });
        let watched = shared.clone();
        let thread = Builder::new().name("watchdog".into()).spawn(move || watch(&watched));
        thread.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
        Ok(Watchdog { shared })
    }

    /// Replaces the settings.
    pub fn configure(&self, settings: WatchdogSettings) {
        failure::set_timeout(Duration::from_secs_f64(settings.finalize_seconds));
        *lock(&self.shared.settings) = settings;
    }

    /// Opens the sockets for beats, and rank 0's arbiter (see `arbiter.rs`).
    ///
    /// # Errors
    /// [`Error::Environment`] if no socket can be opened; errors of the broadcast.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn connect(&self, world: &dyn Collective) -> Result<()> {
        let (rank, world_size) = (world.rank(), world.world_size());
        if world_size < 2 {
            // A world of one needs no port.
            return Ok(());
        }
        if pulse::is_root(rank) {
            let (hub, mut address) =
                Heartbeat::hub(world_size, RandomState::new().hash_one(std::process::id()))?;
            // Set before the others learn the address, so that a rank that never sends a beat is
            // missed by name.
            *lock(&self.shared.heartbeat) = Some(hub);
            address.arbiter_port = arbiter::open(world_size, address.token())?;
            let address = serde_json::to_string(&address).expect("texts and numbers are JSON");
            return broadcast_text(world, &address, 0).map(drop);
        }
        let address = broadcast_text(world, "", 0)?;
        let address: HubAddress = serde_json::from_str(&address).expect("rank 0 sent its address");
        arbiter::use_arbiter(&address);
        let mut spoke = Heartbeat::spoke(&address)?;
        // The first beat is sent at once, so that also a rank that hangs within its first second is
        // reported with its host.
        spoke.beat(&pulse::now());
        *lock(&self.shared.heartbeat) = Some(spoke);
        Ok(())
    }
}

/// Time without progress, as far as this thread was awake to see it. A process that was suspended,
/// or a machine that slept, does not count all of that time at once.
struct Standstill {
    seen: Pulse,
    still: Duration,
    observed: Instant,
}

impl Standstill {
    fn since(now: Pulse) -> Self {
        Standstill { seen: now, still: Duration::ZERO, observed: Instant::now() }
    }

    fn observe(&mut self, now: Pulse, interval: Duration) -> Duration {
        let slept =
            std::mem::replace(&mut self.observed, Instant::now()).elapsed().min(3 * interval);
        let has_moved = now.age < self.seen.age + slept / 2 || now.step != self.seen.step;
        self.still = if has_moved { now.age.min(slept) } else { self.still + slept };
        self.seen = now;
        self.still
    }
}

/// Step times, measured by the watching thread.
#[derive(Default)]
struct Steps {
    last: Option<(u64, Instant)>,
    seconds: VecDeque<f64>,
}

impl Steps {
    fn observe(&mut self, step: u64) {
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

    /// Median in seconds; zero before the first step was measured.
    fn median(&self) -> f64 {
        median(self.seconds.iter().copied(), Middle::Upper).unwrap_or_default()
    }
}

fn watch(shared: &Shared) {
    let (mut standstill, mut steps) = (Standstill::since(pulse::now()), Steps::default());
    loop {
        let settings = lock(&shared.settings).clone();
        let interval = settings.beat_interval();
        std::thread::sleep(interval);
        let now = pulse::now();
        steps.observe(now.step);
        let still = standstill.observe(now, interval);
        let overview = lock(&shared.heartbeat)
            .as_mut()
            .map(|heartbeat| heartbeat.beat(&now))
            .unwrap_or_default();
        let (first_step, last_save) = (pulse::first_step(), pulse::last_save().as_secs_f64());
        let limit =
            settings.limit(&now, Pace { first_step, step_median: steps.median(), last_save });
        let (rank, world_size) = (pulse::rank(), pulse::world_size());
        // Another rank that this one waits for may still be making progress.
        let no_rank_moves = overview.still.is_none_or(|others| others > limit);
        let hub_is_gone = overview.silence > silence_limit(interval);
        if settings.enabled && still > limit + report_delay(rank, hub_is_gone) && no_rank_moves {
            let (host, reading) = (pulse::host(), beats::reading(&now));
            if hub_is_gone {
                // Rank 0 is gone, and this rank has already waited for its turn.
                failure::skip_arbitration();
            }
            end(
                &Observer {
                    rank,
                    world_size,
                    host: &host,
                    now: &now,
                    still,
                    silence_limit: silence_limit(interval),
                    reading,
                },
                &overview,
            );
        }
    }
}

/// Silence after which a rank counts as gone: some beats may be lost, or late on a busy machine.
fn silence_limit(interval: Duration) -> Duration {
    5 * interval
}

/// Time by which a rank reports later than rank 0, so that only one of them does: rank 0, which
/// knows most, or one of the next if rank 0 is gone. Ending a world takes a second or two.
fn report_delay(rank: usize, hub_is_gone: bool) -> Duration {
    let doublings = (usize::BITS - rank.leading_zeros()).saturating_sub(1);
    match rank {
        0 => Duration::ZERO,
        _ if hub_is_gone => Duration::from_millis(500 + 2000 * u64::from(doublings)),
        _ => Duration::from_secs(5),
    }
}

fn end(observer: &Observer<'_>, overview: &Overview) -> ! {
    let verdict = observer.verdict(overview);
    collective::end(verdict.code, verdict.name, &verdict.what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phase::Phase;

    fn at(step: u64, age: f64) -> Pulse {
        let age = Duration::from_secs_f64(age);
        Pulse { step, phase: Phase::Forward, stage: None, collectives: 0, age }
    }

    #[test]
    fn a_process_that_was_stopped_has_not_stood_still() {
        let interval = Duration::from_millis(10);
        let mut standstill = Standstill::since(at(1, 0.0));
        let after_a_stop = standstill.observe(at(1, 1000.0), interval);
        assert!(after_a_stop <= 3 * interval, "{after_a_stop:?}");
    }

    #[test]
    fn a_pulse_that_moves_begins_anew() {
        let interval = Duration::from_millis(10);
        let mut standstill = Standstill::since(at(1, 0.0));
        standstill.still = Duration::from_secs(100);
        assert!(standstill.observe(at(2, 0.0), interval) <= interval);
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
        assert_eq!(report_delay(0, false), Duration::ZERO);
        assert!(
            report_delay(1, true) > Duration::ZERO
                && report_delay(1, true) < report_delay(2, true)
                && report_delay(4095, true) < Duration::from_secs(30)
        );
        assert_eq!(report_delay(1, false), report_delay(7, false), "rank 0 is there to speak");
    }

    #[test]
    fn ranks_that_beat_know_of_one_another() {
        let (mut hub, address) = Heartbeat::hub(3, 7).unwrap();
        let mut spoke = Heartbeat::spoke(&address).unwrap();
        let began = Instant::now();
        // The spoke of this process also sends rank 0 as its rank, so the hub receives its own
        // beats; ranks 1 and 2 stay unknown.
        let overview = loop {
            spoke.beat(&at(4, 0.0));
            let received = hub.beat(&at(5, 0.0));
            assert_eq!(received.unknown, [1, 2]);
            let overview = spoke.beat(&at(4, 0.0));
            if !overview.unknown.is_empty() {
                break overview;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "no answer");
        };
        assert_eq!(overview.unknown, [1, 2]);
        assert_eq!(overview.states[0].pulse.step, 5);
    }
}
