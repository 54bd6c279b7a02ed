//! Files: read without trust, written without halves.
//!
//! | question | file |
//! |---|---|
//! | is this file of tensors sound, what is in it | `safetensors/` |
//! | what is this file, if not what was expected | `contents.rs` |
//! | are all its numbers finite | `finite.rs` |
//! | how many files may stay open | `descriptors.rs` |
//! | is it the file that was written | `sha256.rs` |
//! | can this output be written | `outputs.rs` |
//! | the calls that create, write, sync, rename and delete | `disk.rs` |
//! | a document replaced whole, a line appended whole | `durable.rs` |

pub mod contents;
pub(crate) mod descriptors;
pub(crate) mod disk;
pub mod durable;
pub(crate) mod finite;
pub mod outputs;
pub mod safetensors;
pub mod sha256;
