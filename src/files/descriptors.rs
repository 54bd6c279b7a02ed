//! Descriptors: a process may hold only as many files open as its limit allows, and data files are
//! not its only ones.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that stay open at most, however high the limit is: open files cost every rank's kernel
/// memory and a network's file server a lock each.
const MOST_KEPT: u64 = 1 << 14;

/// Number of `files` that may stay open. The rest is opened for each read.
///
/// The soft limit is raised as far as that needs and the hard limit allows; what stays open is at
/// most half of the free descriptors, so that libtorch, MPI, NCCL, threads and the run folder have
/// the other half.
pub(crate) fn kept_open(files: usize) -> usize {
    let (wanted, in_use) = (MOST_KEPT.min(files as u64), in_use());
    allowed(wanted, in_use, raised_to(in_use + 2 * wanted)) as usize
}

fn allowed(wanted: u64, in_use: u64, limit: u64) -> u64 {
    wanted.min(limit.saturating_sub(in_use) / 2)
}

/// The soft limit after an attempt to have it at `needed` at least.
fn raised_to(needed: u64) -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let Some(current) = current else { return u64::MAX };
    let aim = maximum.map_or(needed, |maximum| maximum.min(needed));
    let raised = aim > current
        && setrlimit(Resource::Nofile, Rlimit { current: Some(aim), maximum }).is_ok();
    if raised { aim } else { current }
}

/// Descriptors of this process, its guess where `/proc` is not there.
fn in_use() -> u64 {
    const USUAL: u64 = 64;
    fs::read_dir("/proc/self/fd").map_or(USUAL, |entries| entries.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_free_descriptors_are_left_to_others() {
        assert_eq!(allowed(40, 12, 1024), 40, "there is room for all");
        assert_eq!(allowed(40, 12, 46), 17);
        assert_eq!(allowed(1017, 24, 1024), 500);
        assert_eq!((allowed(40, 46, 46), allowed(40, 50, 46)), (0, 0), "there is no room at all");
    }

    #[test]
    fn the_limit_is_raised_to_what_is_needed_and_never_lowered() {
        let before = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert!(raised_to(1) >= before);
        let needed =
            before.saturating_add(1).min(getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX));
        assert!(raised_to(needed) >= needed);
        assert!(getrlimit(Resource::Nofile).current.is_none_or(|current| current >= needed));
    }
}
