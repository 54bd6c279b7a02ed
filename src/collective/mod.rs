//! How ranks exchange tensors: one trait, one file a backend.
//!
//! Every rank issues the same operations in the same order on equal shapes; that is the caller's
//! duty and the contract which `tests/contract.rs` puts each backend through.

pub mod agreement;
mod call;
mod ending;
mod exchange;
mod ledger;
mod meter;
mod mpi;
mod nccl;
mod placement;
mod slurm;
mod solo;
mod tcp;
mod texts;
mod threads;

use std::time::Duration;

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::failure;
use crate::pulse;
pub use ending::{abort, end, finish, finish_with, follow, leave};
pub use ledger::{Issued, Signature};
pub use meter::{Meter, Spent};
pub use mpi::{Mpi, library_version as mpi_library_version};
pub use nccl::{Limits, Nccl, library_version as nccl_library_version};
pub use placement::{Launch, Placement};
use placement::{TcpPlacement, placement_among, tcp_placement_among};
pub use solo::Solo;
pub use tcp::Tcp;
pub use texts::{broadcast_text, gather_texts, local_rank, nodes, spans};
pub use threads::Threads;

/// How the ranks' elements become one. Backends differ in what becomes of a NaN in `Min` and `Max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// Rounded to the tensors' kind after each addition.
    Sum,
    Min,
    Max,
}

/// A tensor that ranks hold slices of: the slice of this one, and the whole, slice after slice in
/// rank order. `owned` may be a view of `full`.
#[derive(Debug)]
pub struct Sliced {
    pub owned: Tensor,
    pub full: Tensor,
}

/// What ranks do together. Tensors are contiguous, f32, f64, bf16 or i64, on the backend's device,
/// of equal shape on every rank. An operation takes several tensors where several go together: they
/// travel as one.
///
/// # Errors
/// [`Error::Collective`] for a tensor that the backend cannot carry, at the call; for peers that
/// fail, mostly at the wait. [`Error::Desync`] where ranks are found at different operations.
///
/// # Ordering
/// Operations of one communicator start in program order. Results are bitwise equal on all ranks
/// and from run to run at the same world size. On a CPU every backend sums in one order, the
/// pairwise tree over the ranks: `(0+1)+(2+3)` for four.
pub trait Collective {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;

    /// Reduces each buffer in place on every rank. The work owns the tensors until it is waited
    /// for.
    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work>;

    /// Reduces each `full` and leaves this rank's slice in `owned`. The rest of `full` may be
    /// written over.
    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work>;

    /// Joins every rank's `owned` in rank order in `full`.
    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work>;

    /// Copies `buffer` of rank `root` into `buffer` of every rank.
    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work>;

    /// Returns once every rank has called it.
    fn barrier(&self) -> Result<()>;

    /// The ranks that give the same `color` as a world of their own, in the order of their ranks in
    /// this one.
    ///
    /// # Ordering
    /// Every rank calls it, with no work under way.
    fn split(&self, color: usize) -> Result<Box<dyn Collective>>;

    /// Whether it carries tensors of this device.
    fn carries(&self, device: Device) -> bool;

    /// Seconds since the last call that collectives were under way, and that computation stood
    /// still for them.
    fn spent(&self) -> Spent;

    /// What was called for on this communicator so far: equal on all ranks that are in step.
    fn issued(&self) -> Issued;
}

/// A collective under way. It owns the tensors that the backend still reads or writes.
#[must_use = "a collective under way must be waited for"]
pub struct Work {
    finish: Box<dyn FnOnce() -> Result<()>>,
}

impl Work {
    /// A collective that `finish` completes.
    pub fn new(finish: impl FnOnce() -> Result<()> + 'static) -> Self {
        Work { finish: Box::new(finish) }
    }

    /// A collective that is complete already.
    pub fn done() -> Self {
        Work::new(|| Ok(()))
    }

    /// Blocks until the results may be read.
    pub fn wait(self) -> Result<()> {
        (self.finish)()
    }
}

/// Where this process was put. With [`connect`], the only reader of environment variables in the
/// crate.
///
/// # Errors
/// [`Error::Environment`] if a launcher's variable holds no number.
pub fn placement() -> Result<Placement> {
    placement_among(variable)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The rank that a launcher gave this process, for what must be said before the ranks can meet;
/// `None` without a launcher.
pub fn launched_rank() -> Option<usize> {
    placement::rank_among(variable)
}

/// The batch job that this process is part of; the same one when it is started again.
pub fn job() -> Option<String> {
    variable("SLURM_JOB_ID")
}

/// Joins the world that the launcher made; without a launcher, a world of one that never touches
/// MPI. `patience`: how long ranks wait for each other over TCP, since the nodes of a large job
/// start minutes apart.
///
/// # Errors
/// [`Error::Environment`] if the launcher started several tasks of which each finds itself alone,
/// or does not say what `launch` needs; [`Error::Collective`] if ranks do not come.
pub fn connect(launch: Launch, patience: Duration) -> Result<Box<dyn Collective>> {
    match launch {
        Launch::Auto => match placement()? {
            Placement::Alone => Ok(Box::new(Solo)),
            Placement::Launched { size } => connect_mpi(size),
        },
        Launch::Mpi => match placement()? {
            Placement::Alone => connect_mpi(None),
            Placement::Launched { size } => connect_mpi(size),
        },
        Launch::Tcp => connect_tcp(&tcp_placement_among(variable)?, patience),
    }
}

fn connect_tcp(placement: &TcpPlacement, patience: Duration) -> Result<Box<dyn Collective>> {
    let TcpPlacement { rank, world_size, rendezvous } = placement;
    pulse::take_place(*rank, *world_size);
    // Rank 0 says why it refuses before the others hear of it, and end.
    let refusing = |error: &Error| {
        failure::tell(error.exit_code(), error.name(), &error.to_string());
    };
    Ok(Box::new(Tcp::connect_for_life(*rank, *world_size, rendezvous, patience, &refusing)?))
}

fn connect_mpi(size: Option<usize>) -> Result<Box<dyn Collective>> {
    let hint = "wrong --mpi= plugin? try srun --mpi=pmix or mpirun, or --launch tcp without MPI";
    let tasks = size.unwrap_or(1);
    if placement::lacks_a_pmi(variable) {
        let what = match tasks {
            1 => "--launch mpi: srun gave this task no PMI, without which MPI does not start; leave --launch out to run it alone".into(),
            _ => format!("launcher says {tasks} tasks, and gave them no PMI to find one another by: {hint}"),
        };
        return Err(met_by_all(tasks, what));
    }
    let mpi = Mpi::connect()?;
    pulse::take_place(mpi.rank(), mpi.world_size());
    if tasks > 1 && mpi.world_size() == 1 {
        // Each would train alone and all would write to one run folder.
        return Err(met_by_all(tasks, format!("launcher says {tasks} tasks, MPI says 1: {hint}")));
    }
    Ok(Box::new(mpi))
}

/// An error that each of `tasks` processes meets alike before they can agree: the launcher's rank 0
/// says it.
fn met_by_all(tasks: usize, what: String) -> Error {
    let error = Error::environment(what);
    let rank = launched_rank().unwrap_or(0);
    pulse::take_place(rank, tasks);
    if pulse::is_root(rank) {
        error
    } else {
        Error::Peer { speaker: Some(0), code: error.exit_code(), what: error.to_string() }
    }
}
