//! Settings of malloc, from which libtorch takes the memory of CPU tensors.

/// Largest freed block that is kept. Larger ones, the gradients of whole stages, rarely fit a later
/// request: keeping them as well once took 300 MB on top of 1.6 GB.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 64 << 20;

/// Keeps freed memory for the next tensor of its size. By default large blocks are returned to the
/// system and come back as pages that must be cleared, which took 3 % of a step of 71 million
/// parameters in bfloat16. With this, a process keeps its peak memory.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub fn keep_freed_memory() {
    for (parameter, bytes) in
        [(libc::M_MMAP_THRESHOLD, KEPT_BYTES), (libc::M_TRIM_THRESHOLD, libc::c_int::MAX)]
    {
        // SAFETY: a setting of malloc, which takes its own lock.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}

#[cfg(not(target_env = "gnu"))]
pub fn keep_freed_memory() {}

/// Makes all threads allocate from one malloc arena; must be called while there is only one thread.
/// Batches are read on one thread and freed on another. With an arena of the reader's own, freed
/// memory goes back to the system even if it is to be kept, and a batch of 17 MB took twice as long
/// to read in most runs.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub fn share_memory_among_threads() {
    // SAFETY: as in `keep_freed_memory`.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

#[cfg(not(target_env = "gnu"))]
pub fn share_memory_among_threads() {}
