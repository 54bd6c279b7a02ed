//! A run on the disk: its folder and lock, its checkpoints, its initial weights, and requests to
//! it.
//!
//! | question | file |
//! |---|---|
//! | which folder and checkpoint is used | `folder.rs`, `resume.rs`, `locate.rs`, `runs.rs` |
//! | which process uses it | `lock.rs` |
//! | does it make progress | `resume_log.rs` |
//! | which settings have changed since | `changes.rs` |
//! | when does it end | `length.rs` |
//! | what survives a power cut | `checkpoint/`, `optimizer_state.rs`, `guard.rs` |
//! | what the whole model of a checkpoint is, and what others read | `whole.rs`, `lora/files.rs` |
//! | what it starts with | `pretrained.rs`, `weights.rs`, `lora/first.rs`, `frozen_base.rs` |
//! | which LoRAs of others its samples get | `lora/added.rs` |
//! | which requests it gets | `requests.rs` |

pub mod changes;
pub mod checkpoint;
pub mod folder;
pub mod frozen_base;
pub mod guard;
pub mod length;
pub mod locate;
pub mod lock;
pub mod lora;
pub mod optimizer_state;
pub mod pretrained;
pub mod requests;
pub mod resume;
pub mod resume_log;
pub mod runs;
pub mod weights;
pub mod whole;

pub use requests::StopFlag;
pub use resume::Resume;
