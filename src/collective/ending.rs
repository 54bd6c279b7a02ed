//! The end of a world: one rank says why, and no other one is gone before it has.
//!
//! Launchers end all processes as soon as one of them ends with an error. So a rank that leaves the
//! word to another waits, not for a time but for its own end, which that one brings about once it
//! has spoken; where it never does, it is given up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{Collective, mpi, tcp};
use crate::error::{Error, Result};
use crate::failure;
use crate::phase::Phase;
use crate::pulse;

/// Set once the ranks have left the world in good order, after which nobody waits for anybody.
static HAS_LEFT: AtomicBool = AtomicBool::new(false);

/// Leaves the world in good order: returns once every rank is here. Nothing may be under way.
pub fn finish(collective: Box<dyn Collective>) -> Result<()> {
    pulse::enter(Phase::Finalize);
    collective.barrier()?;
    drop(collective);
    HAS_LEFT.store(true, Ordering::SeqCst);
    tcp::let_go();
    mpi::finalize()
}

/// Does as [`finish`] for an error that every rank knows of: the rank that met it has said so
/// before any of them may leave. Returns the exit code of all.
///
/// # Errors
/// The error that leaving meets; the given one itself, if it is one of the collectives, after which
/// ranks cannot leave together.
pub fn finish_with(error: Error, collective: Box<dyn Collective>) -> Result<i32> {
    if matches!(error, Error::Collective { .. } | Error::Desync { .. }) {
        return Err(error);
    }
    if !matches!(error, Error::Peer { .. }) {
        failure::tell(error.exit_code(), error.name(), &error.to_string());
    }
    finish(collective)?;
    Ok(error.exit_code())
}

/// Says why this process ends, unless another rank has the word, then ends it and every other rank.
///
/// Callable from any thread and from a panic hook, also while another thread waits inside of a
/// collective.
pub fn end(code: i32, name: &str, what: &str) -> ! {
    if let Some(speaker) = failure::tell(code, name, what)
        && !outlast(speaker)
    {
        failure::tell_instead_of(speaker, code, name, what);
    }
    abort(code)
}

/// Ends this process with the code of a peer that failed: where that is still to be said, after the
/// rank `speaker` has said so and ended the world.
pub fn follow(speaker: Option<usize>, code: i32, what: &str) -> ! {
    if let Some(speaker) = speaker
        && failure::begin(code)
        && !outlast(speaker)
    {
        let limit = failure::patience().as_secs_f64();
        failure::tell_instead_of(
            speaker,
            code,
            "PEER",
            &format!("{what}; it has not ended the run within {limit} s"),
        );
    }
    abort(code)
}

/// Waits until the world ends, and this process with it. Returns `true` where the ranks are not
/// bound to one another and the words have been said, and `false` if the speaker did not end the
/// world in time.
fn outlast(speaker: usize) -> bool {
    if HAS_LEFT.load(Ordering::SeqCst) {
        return true;
    }
    let limit = failure::patience();
    if let Some(has_spoken) = tcp::wait_for_end(speaker, limit) {
        return has_spoken;
    }
    let began = Instant::now();
    while began.elapsed() < limit {
        // Nobody wakes it: the launcher or MPI ends the process.
        std::thread::park_timeout(limit.saturating_sub(began.elapsed()));
    }
    false
}

/// Ends this process and every other rank of the world with exit code `code`, at most seconds
/// later: MPI does so by itself, over TCP the others hear of it at their next wait and end as after
/// any error.
///
/// Callable as [`end`]. Nothing is flushed and no destructor runs: say what happened before.
pub fn abort(code: i32) -> ! {
    let code = failure::first_code(code);
    tcp::last_words(code);
    mpi::abort(code)
}

/// Ends this process, which leaves nobody behind, with exit code `code`. What was written arrives;
/// no destructor and no exit handler runs, since threads may still compute with what they would
/// take away.
pub fn leave(code: i32) -> ! {
    mpi::leave(code)
}
