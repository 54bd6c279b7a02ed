//! Samples of a trained model: their conditions, and the trajectory from noise to data.

pub mod conditions;
pub mod generate;

pub use generate::{SampleRequest, sample};
