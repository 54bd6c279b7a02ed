//! MPI ranks, over rsmpi's raw layer: its safe one borrows buffers by lifetime, which an owned [`Work`] cannot.
//!
//! Two habits of rsmpi are avoided. Its `Universe` finalizes MPI when dropped, which turns an early return on one rank into
//! a hang of all: it is leaked, and [`finalize`] is called only after a last barrier. MPI's own errors abort at once with
//! a code of MPI's choice: they are returned instead, and end the world through [`abort`] like any other error.

#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::marker::PhantomData;
use std::ops::Range;
use std::time::Duration;

use mpi::environment::{Threading, is_finalized, is_initialized};
use mpi::ffi;
use tch::{Device, Kind, Tensor, no_grad};

use super::call::Call;
use super::{Collective, Meter, ReduceOp, Sliced, Spent, Work};
use crate::error::{Error, Result};

/// Reductions and broadcasts travel in pieces of this size. Of 64 KiB to 64 MiB it was the fastest for an all-reduce of
/// 64 MiB between two ranks of one machine, with 0.3 to 0.8 of the time of one piece. MPI counts a piece in C int.
const PIECE_BYTES: usize = 256 << 10;

/// How long `MPI_Abort` may take before the process ends without it.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// This process as a rank of a communicator, and it stays on its thread.
pub struct Mpi {
    communicator: ffi::MPI_Comm,
    rank: usize,
    world_size: usize,
    /// Not `Send`: thread level "serialized" allows no two calls at once (the exception is [`abort`]).
    confined: PhantomData<*const ()>,
    meter: Meter,
}

fn call(operation: &'static str) -> Call {
    Call { backend: "mpi", operation }
}

impl Mpi {
    /// Initializes MPI.
    ///
    /// # Errors
    /// [`Error::Collective`] if that was done before; [`Error::Environment`] if the library allows no watchdog thread.
    pub fn connect() -> Result<Self> {
        let initialized = mpi::initialize_with_threading(Threading::Serialized);
        let (universe, threading) = initialized.ok_or_else(|| call("initialize").error("MPI was initialized before"))?;
        std::mem::forget(universe);
        if threading < Threading::Serialized {
            return Err(Error::environment(format!(
                "MPI grants thread level {threading:?}, Serialized is needed: use another build of it"
            )));
        }
        // SAFETY: MPI is initialized, and both handles are constants of the library.
        check(call("initialize"), unsafe { ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN) })?;
        // SAFETY: a constant of the library.
        Mpi::of(unsafe { ffi::RSMPI_COMM_WORLD })
    }

    fn of(communicator: ffi::MPI_Comm) -> Result<Self> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator is valid, and both results have a place.
        check(call("initialize"), unsafe { ffi::MPI_Comm_rank(communicator, &mut rank) })?;
        check(call("initialize"), unsafe { ffi::MPI_Comm_size(communicator, &mut size) })?;
        let (rank, world_size) = (rank as usize, size as usize);
        Ok(Mpi { communicator, rank, world_size, confined: PhantomData, meter: Meter::default() })
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work> {
        let call = call("all_reduce");
        let mut flight = Flight::of(call, &self.meter);
        for buffer in buffers {
            call.check_buffer(&buffer)?;
            check_device(call, &buffer)?;
            // Sent from a copy: rsmpi does not export MPI_IN_PLACE, and Open MPI reduces a copy faster than in place.
            let sent = no_grad(|| buffer.copy());
            for piece in pieces(buffer.numel(), buffer.kind()) {
                let (from, to) = (at(&sent, piece.start), at(&buffer, piece.start));
                // SAFETY: both pieces lie inside of the tensors that the flight owns, of the datatype's kind, and do not overlap.
                flight.start(|request| unsafe {
                    ffi::MPI_Iallreduce(from, to, piece.len() as c_int, datatype(&buffer), mpi_op(op), self.communicator, request)
                })?;
            }
            flight.tensors.extend([sent, buffer]);
        }
        Ok(flight.work())
    }

    // One reduce for each owner and piece instead of MPI_Ireduce_scatter_block, which Open MPI runs through rank 0 with a
    // scratch copy of all: 0.4 to 0.8 of its time between two ranks (1.3 for four ranks on two cores), and no limit by C int.
    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        let call = call("reduce_scatter");
        let mut flight = Flight::of(call, &self.meter);
        for sliced in tensors {
            call.check_slices(&sliced, self.world_size)?;
            let Sliced { owned, full } = sliced;
            check_device(call, &full)?;
            let full = if overlap(&full, &owned) { no_grad(|| full.copy()) } else { full };
            for piece in pieces(owned.numel(), owned.kind()) {
                for owner in 0..self.world_size {
                    let (from, to) = (at(&full, owner * owned.numel() + piece.start), at(&owned, piece.start));
                    // SAFETY: as in `all_reduce`; the flight owns `full`, which nobody writes, and `owned`, which only the
                    // one reduction of this piece with this rank as root writes.
                    flight.start(|request| unsafe {
                        let count = piece.len() as c_int;
                        ffi::MPI_Ireduce(from, to, count, datatype(&full), mpi_op(op), owner as c_int, self.communicator, request)
                    })?;
                }
            }
            flight.tensors.extend([full, owned]);
        }
        Ok(flight.work())
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        let call = call("all_gather");
        let mut flight = Flight::of(call, &self.meter);
        for sliced in tensors {
            call.check_slices(&sliced, self.world_size)?;
            let Sliced { owned, full } = sliced;
            check_device(call, &full)?;
            let many = |_| call.error(format!("{} elements are too many for one call", owned.numel()));
            let count = c_int::try_from(owned.numel()).map_err(many)?;
            let owned = if overlap(&full, &owned) { no_grad(|| owned.copy()) } else { owned };
            let (from, to, datatype) = (at(&owned, 0), at(&full, 0), datatype(&full));
            // SAFETY: the flight owns both tensors, which do not overlap; `full` has room for `count` elements of each rank.
            flight
                .start(|request| unsafe { ffi::MPI_Iallgather(from, count, datatype, to, count, datatype, self.communicator, request) })?;
            flight.tensors.extend([owned, full]);
        }
        Ok(flight.work())
    }

    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work> {
        let call = call("broadcast");
        call.check_buffer(&buffer)?;
        call.check_root(root, self.world_size)?;
        check_device(call, &buffer)?;
        let mut flight = Flight::of(call, &self.meter);
        for piece in pieces(buffer.numel(), buffer.kind()) {
            let (from, count) = (at(&buffer, piece.start), piece.len() as c_int);
            // SAFETY: the piece lies inside of the tensor that the flight owns, of the datatype's kind.
            flight
                .start(|request| unsafe { ffi::MPI_Ibcast(from, count, datatype(&buffer), root as c_int, self.communicator, request) })?;
        }
        flight.tensors.push(buffer);
        Ok(flight.work())
    }

    fn barrier(&self) -> Result<()> {
        // SAFETY: an `Mpi` exists, so MPI is initialized.
        check(call("barrier"), unsafe { ffi::MPI_Barrier(self.communicator) })
    }

    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        let call = call("split");
        let color = c_int::try_from(color).map_err(|_| call.error(format!("no color {color}")))?;
        // SAFETY: a constant of the library.
        let mut part = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: the communicator is valid, and the result has a place.
        check(call, unsafe { ffi::MPI_Comm_split(self.communicator, color, self.rank as c_int, &mut part) })?;
        Ok(Box::new(Mpi::of(part)?))
    }

    fn spent(&self) -> Spent {
        self.meter.take()
    }
}

/// Requests under way and the tensors which MPI reads and writes for them.
struct Flight {
    call: Call,
    requests: Vec<ffi::MPI_Request>,
    tensors: Vec<Tensor>,
    meter: Meter,
}

impl Flight {
    fn of(call: Call, meter: &Meter) -> Self {
        Flight { call, requests: Vec::new(), tensors: Vec::new(), meter: meter.clone() }
    }

    fn start(&mut self, start: impl FnOnce(*mut ffi::MPI_Request) -> c_int) -> Result<()> {
        // SAFETY: a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(self.call, start(&mut request))?;
        self.requests.push(request);
        Ok(())
    }

    fn work(self) -> Work {
        let meter = self.meter.clone();
        Work::new(move || meter.exposed(|| self.wait()))
    }

    fn wait(mut self) -> Result<()> {
        // SAFETY: a status is plain integers, for which zero is a value.
        let mut statuses: Vec<ffi::MPI_Status> = self.requests.iter().map(|_| unsafe { std::mem::zeroed() }).collect();
        // SAFETY: the requests were started by MPI calls that succeeded and are waited for once; there is a status for each.
        let code = unsafe { ffi::MPI_Waitall(self.requests.len() as c_int, self.requests.as_mut_ptr(), statuses.as_mut_ptr()) };
        if code == ffi::MPI_ERR_IN_STATUS as c_int {
            let failed = |code: &c_int| ![ffi::MPI_SUCCESS as c_int, ffi::MPI_ERR_PENDING as c_int].contains(code);
            check(self.call, statuses.iter().map(|status| status.MPI_ERROR).find(failed).unwrap_or(code))?;
        }
        check(self.call, code)?;
        self.requests.clear();
        Ok(())
    }
}

impl Drop for Flight {
    /// On an error path MPI may still write to the tensors: their memory is never given back.
    fn drop(&mut self) {
        if !self.requests.is_empty() {
            std::mem::forget(std::mem::take(&mut self.tensors));
        }
    }
}

/// Ends every rank of the world with exit code `code`; see [`super::abort`].
pub(super) fn abort(code: i32) -> ! {
    unsafe extern "C" {
        // Not `exit`: destructors of libtorch beside threads that still compute may crash or block, and lose the code.
        safe fn _exit(code: c_int) -> !;
    }
    if !is_running() {
        _exit(code);
    }
    let fallback = move || {
        std::thread::sleep(ABORT_PATIENCE);
        _exit(code);
    };
    let armed = std::thread::Builder::new().name("abort".into()).spawn(fallback);
    // SAFETY: MPI is initialized and not finalized. A call from another thread than the one that is stuck in MPI is beyond
    // thread level "serialized", but works with Open MPI and MPICH, and nothing but the end of the process comes after it.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    // MPI_Abort returns when another thread called it first: that one, or the fallback, ends the process.
    while armed.is_ok() {
        std::thread::park();
    }
    _exit(code)
}

/// Finalizes MPI where it runs. Every rank must have passed a barrier and hold no work.
pub(super) fn finalize() -> Result<()> {
    if !is_running() {
        return Ok(());
    }
    // SAFETY: MPI is initialized and not finalized.
    check(call("finalize"), unsafe { ffi::MPI_Finalize() })
}

/// Name and version of the MPI library. MPI need not be initialized.
pub fn library_version() -> String {
    // SAFETY: the constant is the size of buffer which the standard demands for this call.
    text(unsafe { ffi::RSMPI_MAX_LIBRARY_VERSION_STRING } as usize, |buffer, length| unsafe {
        ffi::MPI_Get_library_version(buffer, length)
    })
}

pub(super) fn is_running() -> bool {
    is_initialized() && !is_finalized()
}

fn check(call: Call, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    // SAFETY: the buffer has the size which the standard demands for this call.
    let message = text(ffi::MPI_MAX_ERROR_STRING as usize, |buffer, length| unsafe { ffi::MPI_Error_string(code, buffer, length) });
    Err(call.error(format!("{message} (code {code})")))
}

/// What an MPI call writes to a text buffer of `size` bytes.
fn text(size: usize, write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> String {
    let mut buffer = vec![0u8; size + 1];
    let mut length = 0;
    write(buffer.as_mut_ptr().cast(), &mut length);
    let length = usize::try_from(length).unwrap_or(0).min(size);
    String::from_utf8_lossy(&buffer[..length]).trim_end_matches(['\0', '\n']).into()
}

fn check_device(call: Call, tensor: &Tensor) -> Result<()> {
    match tensor.device() {
        Device::Cpu => Ok(()),
        other => Err(call.error(format!("cannot carry a tensor on {other:?}, only on the CPU"))),
    }
}

fn pieces(length: usize, kind: Kind) -> impl Iterator<Item = Range<usize>> {
    let step = PIECE_BYTES / kind.elt_size_in_bytes();
    (0..length).step_by(step).map(move |start| start..length.min(start + step))
}

/// Address of an element. Only arithmetic: whoever reads there must own the tensor.
fn at(tensor: &Tensor, element: usize) -> *mut c_void {
    tensor.data_ptr().wrapping_byte_add(element * tensor.kind().elt_size_in_bytes())
}

/// Whether two contiguous tensors share memory, e.g. a rank's slice as a view of the whole; MPI forbids that.
fn overlap(one: &Tensor, other: &Tensor) -> bool {
    at(one, 0) < at(other, other.numel()) && at(other, 0) < at(one, one.numel())
}

fn datatype(tensor: &Tensor) -> ffi::MPI_Datatype {
    // SAFETY: constants of the library.
    unsafe {
        match tensor.kind() {
            Kind::Float => ffi::RSMPI_FLOAT,
            Kind::Double => ffi::RSMPI_DOUBLE,
            Kind::Int64 => ffi::RSMPI_INT64_T,
            other => unreachable!("check_buffer refuses {other:?}"),
        }
    }
}

fn mpi_op(op: ReduceOp) -> ffi::MPI_Op {
    // SAFETY: constants of the library.
    unsafe {
        match op {
            ReduceOp::Sum => ffi::RSMPI_SUM,
            ReduceOp::Min => ffi::RSMPI_MIN,
            ReduceOp::Max => ffi::RSMPI_MAX,
        }
    }
}
