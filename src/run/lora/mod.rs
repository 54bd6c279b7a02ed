//! LoRA files of a run: the one that it begins with, those that its samples get besides, and its
//! own for other programs.

mod added;
pub mod files;
mod first;

pub use added::{AddedLora, AddedLoras};
pub use first::FirstLora;

use crate::error::{Error, Result};
use crate::lora::Family;
use crate::model::Model;
use crate::settings::{Choice, Family as _};

/// The family in whose names LoRA files of a model are written.
///
/// # Errors
/// [`Error::Config`] for a model of our own.
pub fn family_of(model: &Model, key: &str) -> Result<Family> {
    Family::parse(model.name()).map_err(|_| {
        Error::config(
            key,
            format!("the model is a `{}`, of which there are no LoRA files", model.name()),
        )
    })
}
