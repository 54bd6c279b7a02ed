//! How ranks exchange tensors: one trait, one file a backend.
//!
//! Every rank issues the same operations in the same order on equal shapes; that is the caller's duty and the contract
//! which `tests/collectives.rs` puts each backend through.

mod call;
mod meter;
mod mpi;
mod nccl;
mod solo;
mod texts;
mod threads;

use std::time::Duration;

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::pulse;
pub use meter::{Meter, Spent};
pub use mpi::{Mpi, library_version as mpi_library_version};
pub use nccl::{Limits, Nccl, library_version as nccl_library_version, open_cuda_library};
pub use solo::Solo;
pub use texts::{broadcast_text, gather_texts, local_rank, nodes};
pub use threads::Threads;

/// How the ranks' elements become one. Backends differ in what becomes of a NaN in `Min` and `Max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Rounded to the tensors' kind after each addition.
    Sum,
    Min,
    Max,
}

/// A tensor that ranks hold slices of: the slice of this one, and the whole, slice after slice in rank order. `owned` may be
/// a view of `full`.
#[derive(Debug)]
pub struct Sliced {
    pub owned: Tensor,
    pub full: Tensor,
}

/// What ranks do together. Tensors are contiguous, f32, f64, bf16 or i64, on the backend's device, of equal shape on every
/// rank. An operation takes several tensors where several go together: they travel as one.
///
/// # Errors
/// [`Error::Collective`] for a tensor that the backend cannot carry, at the call; for peers that fail, mostly at the wait.
///
/// # Ordering
/// Operations of one communicator start in program order. Results are bitwise equal on all ranks and from run to run at
/// the same world size. On a CPU every backend sums in one order, the pairwise tree over the ranks: `(0+1)+(2+3)` for four.
pub trait Collective {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;

    /// Reduces each buffer in place on every rank. The work owns the tensors until it is waited for.
    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work>;

    /// Reduces each `full` and leaves this rank's slice in `owned`. The rest of `full` may be written over.
    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work>;

    /// Joins every rank's `owned` in rank order in `full`.
    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work>;

    /// Copies `buffer` of rank `root` into `buffer` of every rank.
    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work>;

    /// Returns once every rank has called it.
    fn barrier(&self) -> Result<()>;

    /// The ranks that give the same `color` as a world of their own, in the order of their ranks in this one.
    ///
    /// # Ordering
    /// Every rank calls it, with no work under way.
    fn split(&self, color: usize) -> Result<Box<dyn Collective>>;

    /// Whether it carries tensors of this device.
    fn carries(&self, device: Device) -> bool;

    /// Seconds since the last call that collectives were under way, and that computation stood still for them.
    fn spent(&self) -> Spent;
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

/// Whether a launcher started this process, and among how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// No launcher: a world of one that needs no MPI.
    Alone,
    /// `size` is the launcher's number of tasks; a launcher may give a rank and no size.
    Launched { size: Option<usize> },
}

/// Where this process was put. Environment variables are read in this file only.
///
/// # Errors
/// [`Error::Environment`] if a launcher's variable holds no number.
pub fn placement() -> Result<Placement> {
    placement_among(|name| std::env::var(name).ok())
}

fn placement_among(variable: impl Fn(&str) -> Option<String>) -> Result<Placement> {
    // mpirun inside of a Slurm job inherits Slurm's variables, so the nearer launcher is asked first.
    let mut names = vec!["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];
    if is_slurm_task(&variable) {
        names.extend(["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]);
    }
    let Some((name, text)) = names.into_iter().find_map(|name| Some((name, variable(name)?))) else {
        let launched = variable("PMIX_RANK").is_some();
        return Ok(if launched { Placement::Launched { size: None } } else { Placement::Alone });
    };
    let size = text.parse().map_err(|_| Error::environment(format!("{name}={text:?} is no number of tasks; was it set by hand?")))?;
    Ok(Placement::Launched { size: Some(size) })
}

/// Whether srun started this process: a batch script and an interactive shell have a SLURM_PROCID and SLURM_NTASKS too,
/// but no step number, or one that Slurm reserves (from 0xfffffff0 on).
fn is_slurm_task(variable: impl Fn(&str) -> Option<String>) -> bool {
    let step = variable("SLURM_STEP_ID").and_then(|id| id.parse::<u32>().ok());
    variable("SLURM_PROCID").is_some() && step.is_some_and(|id| id < 0xffff_fff0)
}

/// The batch job that this process is part of; the same one when it is started again.
pub fn job() -> Option<String> {
    std::env::var("SLURM_JOB_ID").ok()
}

/// Joins the world that the launcher made; without a launcher, a world of one that never touches MPI.
///
/// # Errors
/// [`Error::Environment`] if the launcher started several tasks of which each finds itself alone.
pub fn connect() -> Result<Box<dyn Collective>> {
    let Placement::Launched { size } = placement()? else { return Ok(Box::new(Solo)) };
    let mpi = Mpi::connect()?;
    pulse::take_place(mpi.rank(), mpi.world_size());
    match size {
        // Each would train alone and all would write to one run folder.
        Some(tasks) if tasks > 1 && mpi.world_size() == 1 => {
            Err(Error::environment(format!("launcher says {tasks} tasks, MPI says 1: wrong --mpi= plugin? try srun --mpi=pmix or mpirun")))
        }
        _ => Ok(Box::new(mpi)),
    }
}

/// Leaves the world in good order: returns once every rank is here. Nothing may be under way.
pub fn finish(collective: Box<dyn Collective>) -> Result<()> {
    collective.barrier()?;
    mpi::finalize()
}

/// Ends this process and, under MPI, every other rank of the world with exit code `code`, at most seconds later.
///
/// Callable from any thread and from a panic hook, also while another thread waits inside of a collective. Nothing is
/// flushed and no destructor runs: say what happened before.
pub fn abort(code: i32) -> ! {
    mpi::abort(code)
}

/// Ends this process with the code of a peer that failed, after leaving it the time to say why and to end the world itself.
pub fn follow(code: i32) -> ! {
    /// Time that a peer's message takes on its way through the launcher, many times over.
    const PATIENCE: Duration = Duration::from_secs(2);
    if mpi::is_running() {
        std::thread::sleep(PATIENCE);
    }
    mpi::abort(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(variables: &[(&str, &str)]) -> Result<Placement> {
        placement_among(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn without_a_launcher_the_process_is_alone() {
        assert_eq!(placed(&[]).unwrap(), Placement::Alone);
    }

    #[test]
    fn each_launcher_says_how_many_tasks_there_are() {
        let eight = Placement::Launched { size: Some(8) };
        assert_eq!(placed(&[("OMPI_COMM_WORLD_SIZE", "8")]).unwrap(), eight);
        assert_eq!(placed(&[("PMI_SIZE", "8")]).unwrap(), eight);
        assert_eq!(placed(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0")]).unwrap(), eight);
        assert_eq!(placed(&[("PMIX_RANK", "3")]).unwrap(), Placement::Launched { size: None });
    }

    #[test]
    fn a_batch_shell_is_no_task_of_a_step() {
        let batch = [("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")];
        assert_eq!(placed(&batch).unwrap(), Placement::Alone);
        // Slurm's own steps: the batch script (…fb) and salloc's interactive shell (…fa).
        for step in ["4294967291", "4294967290"] {
            assert_eq!(placed(&[batch[0], batch[1], ("SLURM_STEP_ID", step)]).unwrap(), Placement::Alone);
        }
    }

    #[test]
    fn the_nearer_launcher_counts() {
        let nested = [("SLURM_NTASKS", "2"), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "1"), ("OMPI_COMM_WORLD_SIZE", "16")];
        assert_eq!(placed(&nested).unwrap(), Placement::Launched { size: Some(16) });
        let small_step = [("SLURM_NTASKS", "8"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "1")];
        assert_eq!(placed(&small_step).unwrap(), Placement::Launched { size: Some(2) });
    }

    #[test]
    fn a_size_that_is_no_number_is_an_error_of_the_environment() {
        let error = placed(&[("PMI_SIZE", "many")]).unwrap_err();
        assert_eq!(error.exit_code(), 52);
        assert!(error.to_string().contains("PMI_SIZE=\"many\""), "{error}");
    }
}
