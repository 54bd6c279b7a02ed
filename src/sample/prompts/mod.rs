//! Samples by prompts: what is asked for, and the way from a text to the conditions of a model, and
//! from its latents to pixels.
//!
//! Each sample goes through the model by itself, and its noise follows from its own seed alone, so
//! that it is the same whatever is asked for beside it, and on whichever rank.
//!
//! | file | holds |
//! |---|---|
//! | `given.rs` | prompts as they are given: from the command line, a file, the configuration |
//! | `pipeline.rs` | a pipeline with the samples that are asked of it |
//! | `texts.rs` | the texts of all samples, encoded once and padded as a batch's |

mod given;
mod pipeline;
mod texts;

pub use given::{Prompt, SampleSize, read_prompts};
pub use pipeline::{PromptedPipeline, Words};
