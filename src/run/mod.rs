//! A run on the disk: its folder and who uses it, its checkpoints, what it begins with, what it is
//! asked while it goes on.
//!
//! | question | file |
//! |---|---|
//! | which folder, which checkpoint | `folder.rs`, `resume.rs`, `locate.rs`, `runs.rs` |
//! | who uses it | `lock.rs` |
//! | does it get anywhere | `resume_log.rs` |
//! | what has changed since | `changes.rs` |
//! | what survives a power cut | `checkpoint/`, `optimizer_state.rs`, `guard.rs` |
//! | what it begins with | `pretrained.rs` |
//! | what it is asked | `requests.rs` |

pub mod changes;
pub mod checkpoint;
pub mod folder;
pub mod guard;
pub mod locate;
pub mod lock;
pub mod optimizer_state;
pub mod pretrained;
pub mod requests;
pub mod resume;
pub mod resume_log;
pub mod runs;

pub use requests::StopFlag;
pub use resume::Resume;
