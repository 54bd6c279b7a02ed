//! Limits the number of open data files: a process needs file descriptors for other purposes too.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Maximum number of files that stay open, however high the limit is: every open file costs kernel
/// memory on each rank, and a lock on a network's file server.
const MOST_KEPT: u64 = 1 << 14;

/// Returns how many of `files` may stay open. The rest is opened for each read.
///
/// The soft limit is raised as far as needed and as the hard limit allows. At most half of the free
/// descriptors are used, so that libtorch, MPI, NCCL, threads and the run folder have the other
/// half.
pub(crate) fn kept_open(files: usize) -> usize {
    let (wanted, in_use) = (MOST_KEPT.min(files as u64), in_use());
    allowed(wanted, in_use, raised_to(in_use + 2 * wanted)) as usize
}

fn allowed(wanted: u64, in_use: u64, limit: u64) -> u64 {
    wanted.min(limit.saturating_sub(in_use) / 2)
}

/// Tries to raise the soft limit to at least `needed`; returns the limit.
fn raised_to(needed: u64) -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let Some(current) = current else { return u64::MAX };
    let aim = maximum.map_or(needed, |maximum| maximum.min(needed));
    let raised = aim > current
        && setrlimit(Resource::Nofile, Rlimit { current: Some(aim), maximum }).is_ok();
    if raised { aim } else { current }
}

/// Returns the number of open descriptors of this process, estimated if `/proc` is missing.
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
