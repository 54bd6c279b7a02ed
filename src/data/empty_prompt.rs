//! What a condition that is dropped may become.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tch::Tensor;

use super::EMPTY;
use super::safetensors::SafeTensors;
use crate::error::Result;

/// The empty prompt's conditions: the file, and its tensors under the names that batches give them.
#[derive(Debug)]
pub(super) struct EmptyPrompt {
    pub file: SafeTensors,
    /// Behind a lock because threads that read batches share the dataset.
    tensors: Mutex<BTreeMap<String, Tensor>>,
}

impl EmptyPrompt {
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if a number is not finite; as [`SafeTensors::read`].
    pub fn read(file: SafeTensors) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for info in file.tensors() {
            tensors.insert(format!("{EMPTY}{}", info.name), file.read_finite(&info.name)?);
        }
        Ok(EmptyPrompt { file, tensors: Mutex::new(tensors) })
    }

    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        // A panic of another holder leaves the tensors as they were.
        let tensors = self.tensors.lock().unwrap_or_else(PoisonError::into_inner);
        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }
}
