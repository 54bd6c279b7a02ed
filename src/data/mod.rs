//! Training data: datasets, the order of samples, batches read ahead.
//!
//! | question | file |
//! |---|---|
//! | the contents of `dataset.json` | `manifest.rs` |
//! | folders that are no dataset yet | `unmade.rs` |
//! | which samples can share a batch | `group.rs` |
//! | samples by their ids: texts of unequal length, floats of 8 bits, masks of pixels | `dataset/` |
//! | captions of the samples | `captions.rs` |
//! | conditions for generating samples | `conditions.rs` |
//! | replacement of dropped conditions | `empty_prompt.rs` |
//! | the demo's own data | `digits.rs` |
//! | the ids of each step | `order/` |
//! | a rank's share of a step | `share.rs` |
//! | the micro-batches of each step on a rank | `steps.rs` |
//! | reading ahead | `loader.rs` |
//! | mean and spread of latents | `moments.rs` |

pub mod captions;
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
mod settings;
mod share;
mod steps;
mod unmade;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::Tensor;

pub use captions::{Caption, Captions};
pub use conditions::Conditions;
pub use dataset::{Dataset, Folder, LENGTHS, LOSS_MASK, SCALE, TEXTS, TextPadding};
pub use group::{Group, latents_key};
pub use loader::{Loaded, Loader};
pub use manifest::{FILE_NAME as DATASET_FILE, Links};
pub use moments::Moments;
pub use order::Order;
pub use settings::{DataSettings, DatasetSettings, OnBad, OnSmallGroup};
pub use share::Share;
pub use steps::{Place, Steps, batches_of};
pub use unmade::way_to_import;

/// The type of latents in a batch; it determines the task types that can be drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataType {
    #[default]
    Image,
    Video,
}

impl DataType {
    /// Returns the word that the reference, logs and file metadata use.
    pub fn word(self) -> &'static str {
        match self {
            DataType::Image => "image",
            DataType::Video => "video",
        }
    }
}

/// Prefix of the keys under which a batch holds the empty prompt's conditions: one sample, without
/// a batch axis.
pub const EMPTY: &str = "empty.";

/// Samples of one shape, stacked along axis 0 under the reference's keys.
#[derive(Debug)]
pub struct Batch {
    /// Tensors by key, e.g. `image_latents [B, C, H, W]`, `text_embeddings [B, L, D]`.
    pub tensors: BTreeMap<String, Tensor>,
    pub data_type: DataType,
    /// Number of each sample in the run's data; empty if the batch is not from a dataset.
    pub sample_ids: Vec<u64>,
    /// Number of samples that are not finite and were replaced by the next sound ones.
    pub bad_samples: usize,
}

impl Batch {
    /// Returns the latents under the key that the reference gives this type of data.
    pub fn latents(&self) -> Option<&Tensor> {
        self.get(group::latents_key(self.data_type))
    }

    pub fn get(&self, key: &str) -> Option<&Tensor> {
        self.tensors.get(key)
    }

    /// Returns the name of a row in messages: `sample 12` of the dataset, or `row 3` of a batch
    /// that is not from a dataset.
    pub fn sample(&self, row: usize) -> String {
        self.sample_ids.get(row).map_or_else(|| format!("row {row}"), |id| format!("sample {id}"))
    }

    /// Returns a batch that shares the same tensors.
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
