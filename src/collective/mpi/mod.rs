//! Communicators over MPI, through rsmpi's raw layer: its safe layer borrows buffers by lifetime,
//! which an owned [`Work`](super::Work) cannot do.
//!
//! The collectives are those of [`exchange`](super::exchange). `mpi/channel.rs` sends the messages,
//! `mpi/shared.rs` allocates the memory that the ranks of one machine share.
//!
//! Two defaults of rsmpi are avoided. Its `Universe` finalizes MPI when dropped, so an early return
//! on one rank would hang all of them: it is leaked, and [`finalize`] is called only after a last
//! barrier. MPI's own errors abort at once with a code that MPI chooses: they are returned instead,
//! and end the world through [`abort`] like any other error.

#![allow(unsafe_code)]

mod channel;
mod shared;
mod traps;

use std::ffi::c_int;
use std::io::Write;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mpi::environment::{Threading, is_finalized, is_initialized};
use mpi::ffi;
use signal_hook::low_level::exit;

use super::Issued;
use super::call::Call;
use super::exchange::{Communicator, Membership, SharedBuffer, Transport};
use crate::error::{Error, Result};
use channel::{MpiChannel, check, text};

/// Time that `MPI_Abort` may take before the process exits without it.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// A communicator over MPI. Thread level "serialized" allows no two calls at once (the exception is
/// [`abort`](super::abort)).
pub type Mpi = Communicator<MpiTransport>;

/// A communicator of MPI.
pub struct MpiTransport {
    raw: ffi::MPI_Comm,
    membership: Membership,
    /// `None` unless all ranks are on one machine.
    shared_buffer: Option<Rc<SharedBuffer>>,
}

fn call(operation: &'static str) -> Call {
    Call { backend: "mpi", operation }
}

impl Mpi {
    /// Initializes MPI and returns its world.
    ///
    /// # Errors
    /// [`Error::Collective`] if MPI was initialized before; [`Error::Environment`] if the library's
    /// thread level is too low for the watchdog thread.
    pub fn connect() -> Result<Self> {
        let initialized = mpi::initialize_with_threading(Threading::Serialized);
        let (universe, threading) =
            initialized.ok_or_else(|| call("initialize").error("MPI was initialized before"))?;
        std::mem::forget(universe);
        if threading < Threading::Serialized {
            return Err(Error::environment(format!(
                "MPI grants thread level {threading:?}, Serialized is needed: use another build of it"
            )));
        }
        // SAFETY: MPI is initialized, and both handles are constants of the library.
        check(call("initialize"), unsafe {
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN)
        })?;
        // SAFETY: a constant of the library.
        Ok(Mpi::new(MpiTransport::from_raw(unsafe { ffi::RSMPI_COMM_WORLD })?))
    }

    /// Returns the same ranks without shared memory, as if each were on a machine of its own: for
    /// tests and comparisons.
    pub fn by_messages(mut self) -> Self {
        self.transport.shared_buffer = None;
        self
    }
}

impl MpiTransport {
    fn from_raw(raw: ffi::MPI_Comm) -> Result<Self> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator is valid, and both results are written to live integers.
        check(call("initialize"), unsafe { ffi::MPI_Comm_rank(raw, &mut rank) })?;
        check(call("initialize"), unsafe { ffi::MPI_Comm_size(raw, &mut size) })?;
        let membership = Membership { rank: rank as usize, world_size: size as usize };
        Ok(MpiTransport {
            raw,
            membership,
            shared_buffer: shared::shared_buffer(raw, membership)?.map(Rc::new),
        })
    }
}

impl Transport for MpiTransport {
    type Channel = MpiChannel;

    const BACKEND: &'static str = "mpi";

    fn membership(&self) -> Membership {
        self.membership
    }

    fn shared_buffer(&self) -> Option<&Rc<SharedBuffer>> {
        self.shared_buffer.as_ref()
    }

    fn channel(&self, call: Call, issued: Issued) -> MpiChannel {
        MpiChannel { communicator: self.raw, rank: self.membership.rank, call, issued }
    }

    fn barrier(&self, call: Call, _issued: Issued) -> Result<()> {
        // SAFETY: a communicator exists, so MPI is initialized.
        check(call, unsafe { ffi::MPI_Barrier(self.raw) })
    }

    fn split(whole: &Communicator<Self>, call: Call, color: usize) -> Result<Self> {
        let (raw, membership) = (whole.transport.raw, whole.transport.membership);
        let color = c_int::try_from(color).map_err(|_| call.error(format!("no color {color}")))?;
        // SAFETY: a constant of the library.
        let mut part = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: the communicator is valid, and the result is written to a live handle.
        check(call, unsafe {
            ffi::MPI_Comm_split(raw, color, membership.rank as c_int, &mut part)
        })?;
        MpiTransport::from_raw(part)
    }
}

/// Ends every rank of the world with exit code `code`; see [`super::abort`].
pub(super) fn abort(code: i32) -> ! {
    static CALLED: AtomicBool = AtomicBool::new(false);
    if CALLED.swap(true, Ordering::SeqCst) {
        // Another thread is ending the process; two threads inside `MPI_Abort` may crash it.
        std::thread::sleep(2 * ABORT_TIMEOUT);
        exit(code);
    }
    if !is_running() {
        exit(code);
    }
    traps::set(code);
    let fallback = move || {
        std::thread::sleep(ABORT_TIMEOUT);
        exit(code);
    };
    let armed = std::thread::Builder::new().name("abort".into()).spawn(fallback);
    // SAFETY: MPI is initialized and not finalized. Thread level "serialized" does not allow this
    // call while another thread is blocked in MPI, but it works with Open MPI and MPICH, and only
    // the end of the process follows.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    // `MPI_Abort` returned: the fallback thread ends the process.
    while armed.is_ok() {
        std::thread::park();
    }
    exit(code)
}

/// Ends this process alone; see [`super::leave`].
pub(super) fn leave(code: i32) -> ! {
    // A closed pipe cannot be reported any more.
    let _ = std::io::stdout().flush();
    // SAFETY: flushes C's own streams, under their own locks.
    unsafe { libc::fflush(std::ptr::null_mut()) };
    exit(code)
}

/// Finalizes MPI if it is running. Every rank must have passed a barrier and have no work under
/// way.
pub(super) fn finalize() -> Result<()> {
    if !is_running() {
        return Ok(());
    }
    // SAFETY: MPI is initialized and not finalized.
    check(call("finalize"), unsafe { ffi::MPI_Finalize() })
}

/// Returns name and version of the MPI library. MPI need not be initialized.
pub fn library_version() -> String {
    // SAFETY: the constant is the buffer size that the standard demands for this call.
    text(unsafe { ffi::RSMPI_MAX_LIBRARY_VERSION_STRING } as usize, |buffer, length| unsafe {
        ffi::MPI_Get_library_version(buffer, length)
    })
}

pub(super) fn is_running() -> bool {
    is_initialized() && !is_finalized()
}
