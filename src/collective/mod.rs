//! Collectives between ranks: one trait, and one implementation per backend (MPI, NCCL, TCP,
//! threads of one process, a single rank).
//!
//! Every rank must issue the same operations in the same order on tensors of equal shape. That is
//! the caller's duty; `tests/contract.rs` runs every backend through this contract.

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

use std::process::Command;
use std::time::Duration;

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::failure;
use crate::pulse;
pub use ending::{abort, end, end_after_panic, end_with, finish, finish_with, follow, leave};
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

/// Reduction operators. Backends differ in how `Min` and `Max` treat a NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// Rounded to the tensors' kind after each addition.
    Sum,
    Min,
    Max,
}

/// A tensor of which every rank holds one slice. `full` is the concatenation of all ranks' slices
/// in rank order; `owned` is this rank's slice and may be a view of `full`.
#[derive(Debug)]
pub struct Sliced {
    pub owned: Tensor,
    pub full: Tensor,
}

/// The collectives of one communicator. Tensors are contiguous, of kind f32, f64, bf16 or i64, on a
/// device of the backend, and of equal shape on every rank. Operations that take several tensors
/// transfer them as one.
///
/// # Errors
/// [`Error::Collective`] at the call for a tensor that the backend cannot carry; mostly at the wait
/// for a peer that failed. [`Error::Desync`] if the ranks turn out to be at different operations.
///
/// # Ordering
/// Operations of one communicator start in program order. Results are bitwise equal on all ranks
/// and from run to run at the same world size. On a CPU every backend sums in the same order, a
/// pairwise tree over the ranks: `(0+1)+(2+3)` for four.
pub trait Collective {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;

    /// Reduces each buffer in place on every rank. The returned work owns the tensors until it is
    /// waited for.
    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work>;

    /// Reduces each `full` and leaves this rank's slice of the result in `owned`. The other slices
    /// of `full` may be overwritten.
    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work>;

    /// Concatenates every rank's `owned` in rank order in `full`.
    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work>;

    /// Copies rank `root`'s `buffer` into `buffer` on every rank.
    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work>;

    /// Blocks until every rank has called it.
    fn barrier(&self) -> Result<()>;

    /// Splits the communicator: the ranks that pass the same `color` form a communicator of their
    /// own, ranked in the order of their ranks in this one.
    ///
    /// # Ordering
    /// Every rank calls it, with no work under way.
    fn split(&self, color: usize) -> Result<Box<dyn Collective>>;

    /// Ends a communicator that was split off, after an error: peers may be gone, and nothing that
    /// waits for them may be done.
    fn abandon(self: Box<Self>) {}

    /// True if this backend can carry tensors of `device`.
    fn carries(&self, device: Device) -> bool;

    /// Returns the seconds since the last call during which collectives were under way, and the
    /// part of them during which computation waited.
    fn spent(&self) -> Spent;

    /// Returns a summary of the operations issued on this communicator so far. It is equal on all
    /// ranks that are in step.
    fn issued(&self) -> Issued;
}

/// A collective under way. It owns the tensors that the backend still reads or writes.
#[must_use = "a collective under way must be waited for"]
pub struct Work {
    finish: Box<dyn FnOnce() -> Result<()>>,
}

impl Work {
    /// Wraps a collective that `finish` completes.
    pub fn new(finish: impl FnOnce() -> Result<()> + 'static) -> Self {
        Work { finish: Box::new(finish) }
    }

    /// Returns a collective that is already complete.
    pub fn done() -> Self {
        Work::new(|| Ok(()))
    }

    /// Blocks until the results may be read.
    pub fn wait(self) -> Result<()> {
        (self.finish)()
    }
}

/// Reads from the launcher's environment variables how this process was started. Only this
/// function, [`launched_rank`], [`job`], [`restarts`], [`connect`], [`without_launcher`] and
/// [`folders`](crate::folders) read environment variables in this crate.
///
/// # Errors
/// [`Error::Environment`] if a launcher's variable does not hold a number.
pub fn placement() -> Result<Placement> {
    placement_among(variable)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Returns the rank that a launcher gave this process, for messages printed before the ranks are
/// connected; `None` without a launcher.
pub fn launched_rank() -> Option<usize> {
    placement::rank_among(variable)
}

/// Returns the id of the Slurm job that this process belongs to. It stays the same when Slurm
/// requeues the job.
pub fn job() -> Option<String> {
    variable("SLURM_JOB_ID")
}

/// Returns how often Slurm has queued that job again; `None` if never.
pub fn restarts() -> Option<String> {
    variable("SLURM_RESTART_COUNT")
}

/// Removes the launcher's variables from the environment of a child, which then is no rank: it
/// neither waits for peers nor is counted among them.
pub fn without_launcher(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(placement::is_launchers) {
            command.env_remove(name);
        }
    }
    command
}

/// Connects this process to the world that the launcher started; without a launcher, returns a
/// world of one that never touches MPI. `timeout` is how long ranks wait for each other over TCP,
/// because the nodes of a large job start minutes apart.
///
/// # Errors
/// [`Error::Environment`] if the launcher started several tasks but each finds itself alone, or if
/// the variables that `launch` needs are missing; [`Error::Collective`] if not all ranks arrive.
pub fn connect(launch: Launch, timeout: Duration) -> Result<Box<dyn Collective>> {
    match launch {
        Launch::Auto => match placement()? {
            Placement::Alone => Ok(Box::new(Solo)),
            Placement::Launched { size } => connect_mpi(size),
        },
        Launch::Mpi => match placement()? {
            Placement::Alone => connect_mpi(None),
            Placement::Launched { size } => connect_mpi(size),
        },
        Launch::Tcp => connect_tcp(&tcp_placement_among(variable)?, timeout),
    }
}

fn connect_tcp(placement: &TcpPlacement, timeout: Duration) -> Result<Box<dyn Collective>> {
    let TcpPlacement { rank, world_size, rendezvous } = placement;
    pulse::set_rank(*rank, *world_size);
    // Rank 0 prints its reason before the others receive the refusal and exit.
    let on_refusal = |error: &Error| {
        failure::report(error.exit_code(), error.name(), &error.to_string());
    };
    Ok(Box::new(Tcp::connect_for_life(*rank, *world_size, rendezvous, timeout, &on_refusal)?))
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
    pulse::set_rank(mpi.rank(), mpi.world_size());
    if tasks > 1 && mpi.world_size() == 1 {
        // Otherwise each task would train alone and all of them would write to one run folder.
        return Err(met_by_all(tasks, format!("launcher says {tasks} tasks, MPI says 1: {hint}")));
    }
    Ok(Box::new(mpi))
}

/// An error that each of `tasks` processes finds independently, before they are connected. Only the
/// launcher's rank 0 prints it; the others return [`Error::Peer`].
fn met_by_all(tasks: usize, what: String) -> Error {
    let error = Error::environment(what);
    let rank = launched_rank().unwrap_or(0);
    pulse::set_rank(rank, tasks);
    if pulse::is_root(rank) {
        error
    } else {
        Error::Peer { speaker: Some(0), code: error.exit_code(), what: error.to_string() }
    }
}
