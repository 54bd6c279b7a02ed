//! Training data: datasets, the order of samples, batches read ahead.
//!
//! | question | file |
//! |---|---|
//! | what does `dataset.json` say | `manifest.rs` |
//! | which samples may stand in one batch | `group.rs` |
//! | the samples of these ids, please | `dataset.rs`, `sample_file.rs` |
//! | from which conditions are samples generated | `conditions.rs` |
//! | what may a dropped condition become | `empty_prompt.rs` |
//! | the demo's own data | `digits.rs` |
//! | which ids, in this step | `order.rs` |
//! | which of them on this rank | `share.rs` |
//! | before they are needed | `loader.rs` |
//! | how far latents spread | `moments.rs` |

mod conditions;
pub mod dataset;
mod digits;
mod empty_prompt;
pub mod group;
pub mod loader;
#[cfg(test)]
mod made_up;
pub mod manifest;
mod moments;
pub mod order;
mod sample_file;
mod settings;
mod share;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::Tensor;

pub use conditions::Conditions;
pub use dataset::Dataset;
pub use loader::Loader;
pub use moments::Moments;
pub use order::Order;
pub use settings::{DataSettings, OnBad};
pub use share::Share;

/// What kind of latents a batch holds; decides the task types that can be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataType {
    Image,
    Video,
}

impl DataType {
    /// The word that the reference, logs and file metadata use.
    pub fn word(self) -> &'static str {
        match self {
            DataType::Image => "image",
            DataType::Video => "video",
        }
    }
}

/// Prefix of the keys under which a batch holds the empty prompt's conditions, one sample without a
/// batch axis.
pub const EMPTY: &str = "empty.";

/// Samples of one shape, stacked along axis 0 under the reference's keys.
#[derive(Debug)]
pub struct Batch {
    /// E.g. `image_latents [B, C, H, W]`, `text_embeddings [B, L, D]`; in the order of their names.
    pub tensors: BTreeMap<String, Tensor>,
    pub data_type: DataType,
    /// Number of each sample in its dataset; empty where a batch stands alone.
    pub sample_ids: Vec<u64>,
    /// How many of these are not finite, so that their next neighbours stand in for them.
    pub bad_samples: usize,
}

impl Batch {
    /// The latents under the key that the reference gives this type of data.
    pub fn latents(&self) -> Option<&Tensor> {
        self.get(group::latents_key(self.data_type))
    }

    pub fn get(&self, key: &str) -> Option<&Tensor> {
        self.tensors.get(key)
    }

    /// The name of a row in messages: `sample 12` of the dataset, or `row 3` of a batch that stands
    /// alone.
    pub fn sample(&self, row: usize) -> String {
        self.sample_ids.get(row).map_or_else(|| format!("row {row}"), |id| format!("sample {id}"))
    }

    /// The same tensors under a second owner.
    pub fn alias(&self) -> Batch {
        let tensors = self
            .tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect();
        Batch {
            tensors,
            data_type: self.data_type,
            sample_ids: self.sample_ids.clone(),
            bad_samples: self.bad_samples,
        }
    }
}
