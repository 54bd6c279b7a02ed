//! The handwritten digits of the default configuration, compiled into the binary.

use super::Dataset;
use super::manifest::Links;
use crate::error::Result;

const JSON: &str = include_str!("../../configs/digits/dataset.json");
const FILES: &[(&str, &[u8])] = &[
    ("digits.safetensors", include_bytes!("../../configs/digits/digits.safetensors")),
    ("conditions.safetensors", include_bytes!("../../configs/digits/conditions.safetensors")),
];

/// The value of `[data] path` that selects them.
const NAME: &str = "embedded:digits";

impl Dataset {
    /// Opens the dataset that `[data] path` names: a folder, or `embedded:digits`.
    ///
    /// # Errors
    /// As [`Dataset::open_with`].
    pub fn named(path: &str, links: Links) -> Result<Self> {
        if path == NAME { Dataset::embedded(JSON, FILES) } else { Dataset::open_with(path, links) }
    }
}
