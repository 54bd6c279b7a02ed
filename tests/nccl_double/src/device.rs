//! A GPU that a switch lets fail. After a kernel broke, the driver answers everything about the
//! GPU's work with the same error, as CUDA does; memory that ran out is told once.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::cuda::{CuResult, ILLEGAL_ADDRESS, OUT_OF_MEMORY};
use crate::switches::switches;

/// The error that stays; 0 while the GPU is sound.
static FAILED: AtomicU32 = AtomicU32::new(0);

/// The error with which every call is answered, if the GPU has failed.
pub fn failed() -> Option<CuResult> {
    Some(FAILED.load(Ordering::Relaxed)).filter(|code| *code != 0)
}

/// A kernel that NCCL launched has broken.
pub fn break_down() {
    FAILED.store(ILLEGAL_ADDRESS, Ordering::Relaxed);
}

/// Counts a launch of a kernel, and answers with its error.
pub fn count_launch() -> Option<CuResult> {
    static LAUNCHES: AtomicU64 = AtomicU64::new(0);
    let launch = LAUNCHES.fetch_add(1, Ordering::Relaxed);
    let error = switches().kernel_error.filter(|error| error.launch == launch)?;
    if error.code != OUT_OF_MEMORY {
        FAILED.store(error.code, Ordering::Relaxed);
    }
    Some(error.code)
}
