//! The machinery: runs stages forward and backward, and reduces each stage's gradients while the
//! previous stage computes.
//!
//! It is generic over stages and losses and knows nothing of flow matching. The shardings differ in
//! the tensors that each rank holds in full or only its own part of ("owned"):
//!
//! | `sharding` | parameters | gradients | optimizer state | when a stage's backward ends | after the update |
//! |---|---|---|---|---|---|
//! | `none` | all | all | all | all-reduce, last micro-batch only | – |
//! | `optimizer` | all | all | owned | reduce-scatter, last micro-batch only | all-gather |
//! | `gradients` | all | owned | owned | reduce-scatter, every micro-batch | all-gather |
//! | `parameters` | owned | owned | owned | reduce-scatter, every micro-batch | – (all-gather before each use) |
//!
//! This is said of trained parameters. Frozen ones have nothing but their value in the compute
//! kind: no master, gradient or optimizer state. Each rank holds all of it, or with `parameters`
//! its own part; where frozen ones are offloaded, in host memory, from which each stage's are
//! copied while the one before it computes. Linear maps may be packed in fewer bits: each is packed
//! whole, so that no bit depends on who holds which part.

mod ahead;
mod backward;
mod bucket;
mod copies;
pub mod divergence;
mod joining;
mod layout;
mod norms;
mod piece;
pub(crate) mod reducer;
mod replica;
mod settings;
mod sharing;
mod tape;

pub use bucket::Bucket;
pub use copies::Copies;
pub use joining::Joining;
pub use layout::Layout;
pub use norms::global_norm;
pub use piece::{Loan, Piece, Shard};
pub use reducer::{Reducer, Summation};
pub use replica::{Devices, Replica};
pub use settings::{
    Backend, DeviceChoice, Offload, Offloaded, ParallelSettings, Recompute, ReduceDtype, SeedScope,
    Sharding, ShardingGroup,
};
pub use sharing::Sharing;
pub use tape::Tape;
