//! How ranks exchange tensors: one trait, one file a backend.
//!
//! Every rank issues the same operations in the same order on equal shapes; that is the caller's duty and the contract
//! which `tests/collectives.rs` puts each backend through.

use tch::Tensor;

use crate::error::Result;

/// How the ranks' elements become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    Sum,
    /// Sum divided by the number of ranks.
    Mean,
    Min,
    Max,
}

/// What ranks do together. Tensors are contiguous, f32 or i64, on the backend's device, of equal shape on every rank.
///
/// # Ordering
/// Operations of one communicator start in program order. Results are bitwise equal on all ranks and from run to run at
/// the same world size.
pub trait Collective {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;

    /// Reduces `buffer` in place on every rank. The work owns the tensor until it is waited for.
    fn all_reduce(&self, buffer: Tensor, op: ReduceOp) -> Result<Work>;

    /// Reduces `full`, of `world_size * owned` elements, and leaves this rank's slice in `owned`.
    fn reduce_scatter(&self, full: Tensor, owned: Tensor, op: ReduceOp) -> Result<Work>;

    /// Joins every rank's `owned` in rank order in `full`, of `world_size * owned` elements.
    fn all_gather(&self, owned: Tensor, full: Tensor) -> Result<Work>;

    /// Copies `buffer` of rank `root` into `buffer` of every rank.
    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work>;

    /// Returns once every rank has called it.
    fn barrier(&self) -> Result<()>;
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
