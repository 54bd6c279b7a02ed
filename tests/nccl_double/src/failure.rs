//! How the double ends a test: one line that says which rank broke which rule, and exit code 97.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::board;

/// Exit code of a broken rule.
pub const BROKEN: i32 = 97;

/// No rank yet.
const UNKNOWN: usize = usize::MAX;

/// Rank of this process in the first communicator that it joined.
static RANK: AtomicUsize = AtomicUsize::new(UNKNOWN);

/// This process's rank: that of its first communicator, before that the launcher's.
pub fn rank() -> Option<usize> {
    match RANK.load(Ordering::Relaxed) {
        UNKNOWN => ["OMPI_COMM_WORLD_RANK", "PMI_RANK"]
            .iter()
            .find_map(|name| std::env::var(name).ok()?.parse().ok()),
        rank => Some(rank),
    }
}

/// Remembers the rank of the first communicator.
pub fn set_rank(rank: usize) {
    let _ = RANK.compare_exchange(UNKNOWN, rank, Ordering::Relaxed, Ordering::Relaxed);
}

/// Says what is wrong and ends the process. Nothing is unwound: the caller may be C, hold locks, or
/// run at exit.
pub fn fail(sentence: impl AsRef<str>) -> ! {
    let rank = rank().map_or("?".into(), |rank| rank.to_string());
    let line = format!("nccl double: rank {rank}: {}\n", sentence.as_ref());
    // One write, so that the lines of several ranks do not mix. SAFETY: the bytes live through the
    // call; `fflush` of null flushes what C code has printed so far.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::fflush(std::ptr::null_mut());
    }
    board::leave_all(board::FAILED);
    // SAFETY: no state of this process is used afterwards.
    unsafe { libc::_exit(BROKEN) }
}
