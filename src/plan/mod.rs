//! Plans: the memory, data and time that a run would need, computed without running it.

mod attention;
mod between;
mod check;
mod data;
mod footprint;
mod forecast;
mod memory;
mod prediction;
mod sampling;
mod scaling;
mod state_layout;
mod validation;
mod work;

pub use check::{CheckRequest, check};
pub use data::{check_data, shares, verify_data};
pub use footprint::{Footprint, footprint};
pub use forecast::memory_forecast;
pub use memory::RankMemory;
pub use prediction::{Cluster, KNOWN_NAME, Prediction, StageWork, Workload};
pub use scaling::ScalingRequest;
pub use state_layout::StateLayout;
pub use validation::{check_validation, judged_text};
pub use work::{ForwardWork, forward_work};
