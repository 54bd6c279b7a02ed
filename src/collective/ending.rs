//! Ending a world: one rank prints the reason, and no other rank exits before it has.
//!
//! Launchers kill all processes as soon as one of them exits with an error. So a rank that is not
//! the speaker (see [`failure`]) waits to be killed, which the speaker causes after it has printed.
//! A rank whose speaker does not end the world within [`failure::timeout`] speaks in its place.

use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{Collective, mpi, tcp};
use crate::error::{BUG, Error, Result};
use crate::failure;
use crate::phase::Phase;
use crate::pulse;

/// Set once all ranks have disconnected in good order; from then on no rank waits for another.
static HAS_LEFT: AtomicBool = AtomicBool::new(false);

/// Disconnects in good order: returns once every rank has called it. No work may be under way.
pub fn finish(collective: Box<dyn Collective>) -> Result<()> {
    pulse::enter(Phase::Finalize);
    collective.barrier()?;
    drop(collective);
    HAS_LEFT.store(true, Ordering::SeqCst);
    tcp::release_connections();
    mpi::finalize()
}

/// Does as [`finish`] after an error that every rank knows. The rank that met the error prints it
/// before any rank may leave. Returns the exit code, equal on all ranks.
///
/// # Errors
/// The error that [`finish`] meets, or the given error itself if it is one of the collectives,
/// after which ranks cannot leave together.
pub fn finish_with(error: Error, collective: Box<dyn Collective>) -> Result<i32> {
    if matches!(error, Error::Collective { .. } | Error::Desync { .. }) {
        return Err(error);
    }
    if !matches!(error, Error::Peer { .. }) {
        failure::report(error.exit_code(), error.name(), &error.to_string());
    }
    finish(collective)?;
    Ok(error.exit_code())
}

/// Does as [`end`] for an error, and adds to those of a device what else is known of it.
pub fn end_with(error: Error) -> ! {
    let error = failure::explained(error);
    end(error.exit_code(), error.name(), &error.to_string())
}

/// Does as [`end`] in a panic hook. A panic is a bug unless it quotes a library error with an
/// external cause.
pub fn end_after_panic(panic: &PanicHookInfo<'_>) -> ! {
    let text = panic.payload_as_str().unwrap_or("without a text");
    if let Some(error) = Error::from_library(text) {
        end_with(error);
    }
    // Drops the C++ stack that libtorch appends to its messages.
    let first_line = text.lines().next().unwrap_or(text).split("\\n").next().unwrap_or(text);
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    end(BUG, "BUG", &format!("panicked at {location}: {first_line}"))
}

/// Prints why this process ends, unless another rank is the speaker, then ends this and every other
/// rank.
///
/// May be called from any thread and from a panic hook, also while another thread is inside a
/// collective.
pub fn end(code: i32, name: &str, what: &str) -> ! {
    if let Some(speaker) = failure::report(code, name, what)
        && !wait_for_speaker(speaker)
    {
        failure::report_instead_of(speaker, code, name, what);
    }
    abort(code)
}

/// Ends this process with the exit code of a peer that failed. With a `speaker` whose message may
/// not be out yet, first waits for that rank to print it and to end the world.
pub fn follow(speaker: Option<usize>, code: i32, what: &str) -> ! {
    if !failure::record_cause(code) {
        // Another thread of this process has failed before, and may be about to say why; without a
        // speaker, a peer has said it already.
        if speaker.is_some() {
            failure::wait_until_printed();
        }
    } else if let Some(speaker) = speaker
        && !wait_for_speaker(speaker)
    {
        let limit = failure::timeout().as_secs_f64();
        failure::report_instead_of(
            speaker,
            code,
            "PEER",
            &format!("{what}; it has not ended the run within {limit} s"),
        );
    }
    abort(code)
}

/// Blocks until the world ends, and this process with it. Returns `true` if the ranks are no longer
/// connected or the speaker has announced its failure, and `false` if it did not end the world in
/// time.
fn wait_for_speaker(speaker: usize) -> bool {
    if HAS_LEFT.load(Ordering::SeqCst) {
        return true;
    }
    let limit = failure::timeout();
    if let Some(has_spoken) = tcp::wait_for_end(speaker, limit) {
        return has_spoken;
    }
    let began = Instant::now();
    while began.elapsed() < limit {
        // Nothing unparks this thread: the launcher or MPI kills the process.
        std::thread::park_timeout(limit.saturating_sub(began.elapsed()));
    }
    false
}

/// Ends this process and every other rank of the world with exit code `code`, within seconds.
/// `MPI_Abort` kills the other ranks; over TCP they learn of the failure at their next wait and
/// exit as after any error.
///
/// May be called as [`end`] may. Nothing is flushed and no destructor runs, so print the reason
/// before.
pub fn abort(code: i32) -> ! {
    let code = failure::first_code(code);
    tcp::announce_failure(code);
    mpi::abort(code)
}

/// Ends this process alone with exit code `code`, after all ranks have disconnected. Standard
/// output is flushed. No destructor and no exit handler runs, because threads may still compute
/// with what they would free.
pub fn leave(code: i32) -> ! {
    mpi::leave(code)
}
