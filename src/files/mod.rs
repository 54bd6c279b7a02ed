//! Files: untrusted when read, never half-written.
//!
//! | question | file |
//! |---|---|
//! | reading and writing files of tensors | `safetensors/` |
//! | reading what `torch.save` wrote, without running it | `pickle/` |
//! | recognizing files of an unexpected format | `contents.rs` |
//! | checking that all numbers are finite | `finite.rs` |
//! | the numbers that floats of 8 bits stand for | `float8.rs` |
//! | the number of files that may stay open | `descriptors.rs` |
//! | hashes | `sha256.rs` |
//! | results kept between runs | `cache.rs` |
//! | checking that an output can be written | `outputs.rs` |
//! | the calls that create, write, sync, rename and delete | `disk.rs` |
//! | replacing a document whole, appending a line whole | `durable.rs` |

pub mod cache;
pub mod contents;
pub(crate) mod descriptors;
pub(crate) mod disk;
pub mod durable;
pub(crate) mod finite;
pub(crate) mod float8;
pub mod outputs;
pub mod pickle;
pub mod safetensors;
pub mod sha256;
