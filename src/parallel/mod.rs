//! The machinery: stages forward, stages backward, gradients to the reducer while the stage before computes.
//!
//! Generic over stages and losses; it knows nothing of flow matching.

mod backward;
mod bucket;
mod memory;
mod reducer;
mod replica;
mod settings;
mod tape;

pub use bucket::Bucket;
pub use memory::StateLayout;
pub use reducer::Reducer;
pub use replica::Replica;
pub use settings::{DeviceChoice, ParallelSettings, Recompute, ReduceDtype, SeedScope, Sharding};
pub use tape::Tape;
