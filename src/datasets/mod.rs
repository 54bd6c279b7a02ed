//! Makes and describes datasets: from pictures and videos with captions, from folders of tensors,
//! from other datasets, and from the caches of other trainers.
//!
//! | question | file |
//! |---|---|
//! | samples that can be written, wherever they come from | `samples.rs` |
//! | which sample goes into which file | `shards.rs` |
//! | writing a dataset, and going on after a kill | `write.rs` |
//! | pictures and videos with captions as a dataset | `encode/` |
//! | a folder of safetensors files as a dataset | `index.rs` |
//! | joining small files | `pack.rs` |
//! | work on many files at once | `parallel.rs` |
//! | what a dataset holds | `show/` |
//! | caches of other trainers | `caches/` |
//! | folders of pictures and videos | `pictures/` |

pub mod caches;
pub mod encode;
pub mod index;
pub mod pack;
mod parallel;
pub mod pictures;
mod samples;
mod shards;
pub mod show;
pub mod write;

pub use samples::{About, Description, Sample, Samples};
