//! Samples of a trained model: their conditions or prompts, the trajectory from noise to data, and
//! their files.
//!
//! | file | holds |
//! |---|---|
//! | `command.rs` | what `fm-dist sample` does |
//! | `pretrained.rs` | a published pipeline's own model in place of a run |
//! | `scheduler.rs` | a published pipeline's noise levels and solver |
//! | `conditions/` | the start of generation: conditions, noise, shape |
//! | `prompts/` | from prompts to conditions, and from latents to pixels |
//! | `generate.rs` | the trajectory |
//! | `outputs.rs` | the files that samples are written to |

mod command;
pub mod conditions;
pub mod generate;
mod outputs;
mod pretrained;
pub mod prompts;
mod scheduler;

pub use command::{SampleRequest, sample};
pub use outputs::{frames_per_second, is_video};
pub use scheduler::Scheduler;
