//! Commands that do not train: export to a diffusers folder, conversion of LoRA files, dump of one
//! step, list of runs, state of the machine.

mod convert;
pub mod doctor;
mod export;
mod runs;
mod step;

pub use convert::{ConvertRequest, convert};
pub use export::{ExportRequest, export};
pub use runs::{ListingFormat, list_runs};
pub use step::{StepRequest, dump_step};
