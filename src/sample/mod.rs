//! Samples of a trained model: what they start from, and the way from noise to data.

pub mod conditions;
pub mod generate;

pub use generate::{SampleRequest, sample};
