//! Handlers that keep the exit code of a process that is being ended: `MPI_Abort` tears down
//! resources that other threads still use, and may call `exit`.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, Ordering};

use signal_hook::low_level::exit;

static CODE: AtomicI32 = AtomicI32::new(0);

/// Signals of a crash.
const CRASHES: [c_int; 5] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGILL, libc::SIGFPE];

/// From now on this process exits at once with `code` if a thread crashes or calls `exit`.
pub fn set(code: c_int) {
    CODE.store(code, Ordering::SeqCst);
    // SAFETY: the handlers only end the process, which is allowed inside a signal handler; a zeroed
    // action has no flags and an empty mask.
    unsafe {
        // Of several exit handlers the one registered last runs first.
        libc::atexit(end_now);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = end_by_signal as extern "C" fn(c_int) as usize;
        for signal in CRASHES {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

extern "C" fn end_now() {
    exit(CODE.load(Ordering::SeqCst))
}

extern "C" fn end_by_signal(_: c_int) {
    end_now();
}
