//! Commands that do not train: a run's parameters as a diffusers folder, one step laid open, the
//! list of runs, what a machine has.

pub mod doctor;
mod export;
mod runs;
mod step;

pub use export::{ExportRequest, export};
pub use runs::{ListingFormat, list_runs};
pub use step::{StepRequest, dump_step};
