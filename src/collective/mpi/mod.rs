//! MPI ranks, over rsmpi's raw layer: its safe one borrows buffers by lifetime, which an owned [`Work`] cannot.
//!
//! Nothing travels until somebody waits: MPI moves data only inside of its calls. So communication hides behind no
//! computation here, and a thread that made it would gain nothing: it must spin, and takes from the computation the core
//! that it would have had (with two ranks on two cores, half of it). Works that are let go are carried out by the next wait.
//!
//! `mpi/part.rs` says what becomes of a tensor, `mpi/exchange.rs` walks through an operation's pieces, `mpi/queue.rs` keeps
//! operations in order, `mpi/board.rs` has the memory that ranks of one machine share, `mpi/wire.rs` the messages.
//!
//! Two habits of rsmpi are avoided. Its `Universe` finalizes MPI when dropped, which turns an early return on one rank into
//! a hang of all: it is leaked, and [`finalize`] is called only after a last barrier. MPI's own errors abort at once with
//! a code of MPI's choice: they are returned instead, and end the world through [`abort`] like any other error.

#![allow(unsafe_code)]

mod board;
mod exchange;
mod part;
mod queue;
mod wire;

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::rc::Rc;
use std::time::Duration;

use mpi::environment::{Threading, is_finalized, is_initialized};
use mpi::ffi;
use tch::{Device, Tensor};

use super::call::Call;
use super::{Collective, Meter, ReduceOp, Sliced, Spent, Work};
use crate::error::{Error, Result};
use board::Board;
use exchange::Operation;
use part::{LINE_BYTES, PIECE_BYTES, Part, Pattern, Place, piece_bytes};
use queue::Queue;
use wire::{check, text};

/// How long `MPI_Abort` may take before the process ends without it.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// This process as a rank of a communicator. It stays on its thread, as its queue does: thread level "serialized" allows no
/// two calls at once (the exception is [`abort`](super::abort)).
pub struct Mpi {
    place: Place,
    /// Where the ranks are on one machine.
    board: Option<Rc<Board>>,
    /// Number of the next operation of this communicator, the same on all of its ranks.
    next: Cell<u64>,
    queue: Rc<RefCell<Queue>>,
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
        Mpi::of(unsafe { ffi::RSMPI_COMM_WORLD }, Rc::default())
    }

    /// The same ranks without shared memory, as if each were on a machine of its own: for tests, and to compare.
    pub fn by_messages(self) -> Self {
        Mpi { board: None, ..self }
    }

    fn of(communicator: ffi::MPI_Comm, queue: Rc<RefCell<Queue>>) -> Result<Self> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator is valid, and both results have a place.
        check(call("initialize"), unsafe { ffi::MPI_Comm_rank(communicator, &mut rank) })?;
        check(call("initialize"), unsafe { ffi::MPI_Comm_size(communicator, &mut size) })?;
        let place = Place { communicator, rank: rank as usize, world_size: size as usize };
        let board = Board::of(place, PIECE_BYTES, LINE_BYTES)?.map(Rc::new);
        Ok(Mpi { place, board, next: Cell::new(0), queue, meter: Meter::default() })
    }

    /// Queues an operation; the work carries it out, after those before it.
    fn issue(&self, call: Call, parts: Vec<Part>, tensors: Vec<Tensor>) -> Work {
        let operation = Operation::new(self.place, self.board.clone(), call, self.next.replace(self.next.get() + 1), parts, tensors);
        let number = self.queue.borrow_mut().push(operation);
        let (queue, meter) = (self.queue.clone(), self.meter.clone());
        Work::new(move || meter.exposed(|| queue.borrow_mut().finish(call, number)))
    }

    /// Bytes of a piece on the way between these ranks.
    fn piece_bytes(&self) -> usize {
        self.board.as_ref().map_or_else(|| piece_bytes(self.place.world_size), |board| board.piece_bytes)
    }

    fn issue_sliced(&self, call: Call, pattern: Pattern, tensors: Vec<Sliced>) -> Result<Work> {
        let part = |sliced: &Sliced| {
            call.check_slices(sliced, self.place.world_size)?;
            check_device(call, &sliced.full)?;
            Part::sliced(self.place, self.piece_bytes(), pattern, &sliced.owned, &sliced.full)
                .ok_or_else(|| call.error("owned is a view of full at another place than this rank's slice"))
        };
        let parts = tensors.iter().map(part).collect::<Result<_>>()?;
        Ok(self.issue(call, parts, tensors.into_iter().flat_map(|sliced| [sliced.owned, sliced.full]).collect()))
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn world_size(&self) -> usize {
        self.place.world_size
    }

    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work> {
        let call = call("all_reduce");
        let part = |buffer: &Tensor| {
            call.check_buffer(buffer)?;
            check_device(call, buffer)?;
            Ok(Part::whole(self.place, self.piece_bytes(), Pattern::all_reduce(op, buffer, self.place.world_size), buffer))
        };
        let parts = buffers.iter().map(part).collect::<Result<_>>()?;
        Ok(self.issue(call, parts, buffers))
    }

    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        self.issue_sliced(call("reduce_scatter"), Pattern::Owned(op), tensors)
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        self.issue_sliced(call("all_gather"), Pattern::Gathered, tensors)
    }

    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work> {
        let call = call("broadcast");
        call.check_buffer(&buffer)?;
        call.check_root(root, self.place.world_size)?;
        check_device(call, &buffer)?;
        Ok(self.issue(call, vec![Part::whole(self.place, self.piece_bytes(), Pattern::From(root), &buffer)], vec![buffer]))
    }

    fn barrier(&self) -> Result<()> {
        let call = call("barrier");
        self.queue.borrow_mut().drain(call)?;
        // SAFETY: an `Mpi` exists, so MPI is initialized.
        check(call, unsafe { ffi::MPI_Barrier(self.place.communicator) })
    }

    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        let call = call("split");
        self.queue.borrow_mut().drain(call)?;
        let color = c_int::try_from(color).map_err(|_| call.error(format!("no color {color}")))?;
        // SAFETY: a constant of the library.
        let mut part = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: the communicator is valid, and the result has a place.
        check(call, unsafe { ffi::MPI_Comm_split(self.place.communicator, color, self.place.rank as c_int, &mut part) })?;
        Ok(Box::new(Mpi::of(part, self.queue.clone())?))
    }

    fn carries(&self, device: Device) -> bool {
        device == Device::Cpu
    }

    fn spent(&self) -> Spent {
        self.meter.take()
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

fn check_device(call: Call, tensor: &Tensor) -> Result<()> {
    match tensor.device() {
        Device::Cpu => Ok(()),
        other => Err(call.error(format!("cannot carry a tensor on {other:?}, only on the CPU"))),
    }
}
