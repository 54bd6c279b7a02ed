//! The empty prompt's conditions, which can replace dropped conditions.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::EMPTY;
use super::dataset::read_widened;
use crate::error::Result;
use crate::files::safetensors::SafeTensors;

/// The empty prompt's conditions: the file, and its tensors under the names that batches give them.
#[derive(Debug)]
pub(super) struct EmptyPrompt {
    pub file: SafeTensors,
    /// Locked because the threads that read batches share the dataset.
    tensors: Mutex<BTreeMap<String, Tensor>>,
}

impl EmptyPrompt {
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if a number is not finite; errors of
    /// [`SafeTensors::read`].
    pub fn read(file: SafeTensors) -> Result<Self> {
        // One sample.
        let tensors = read_widened(&file, 1)?.into_iter();
        let named = tensors.map(|(key, tensor)| (format!("{EMPTY}{key}"), tensor)).collect();
        Ok(EmptyPrompt { file, tensors: Mutex::new(named) })
    }

    /// Adds a mask of valid tokens for a text that has none.
    pub fn add_mask(&mut self, text: &str, mask: &str) {
        let tensors = self.tensors.get_mut().unwrap_or_else(PoisonError::into_inner);
        let text = tensors.get(&format!("{EMPTY}{text}"));
        let Some(tokens) = text.and_then(|text| text.size().first().copied()) else { return };
        let ones = || Tensor::ones([tokens], (Kind::Int64, Device::Cpu));
        tensors.entry(format!("{EMPTY}{mask}")).or_insert_with(ones);
    }

    /// Returns the first key whose tensor another empty prompt does not have, or has otherwise;
    /// masks that were added do not count.
    pub fn difference(&self, other: &EmptyPrompt) -> Option<String> {
        let stored = |empty: &EmptyPrompt| -> BTreeMap<String, Tensor> {
            let is_stored = |name: &str| empty.file.holds(name.trim_start_matches(EMPTY));
            empty.tensors().into_iter().filter(|(name, _)| is_stored(name)).collect()
        };
        let (own, others) = (stored(self), stored(other));
        let differs = |key: &&String| match (own.get(*key), others.get(*key)) {
            (Some(own), Some(other)) => own.kind() != other.kind() || !own.equal(other),
            _ => true,
        };
        let found = own.keys().chain(others.keys()).find(differs)?;
        Some(found.trim_start_matches(EMPTY).to_string())
    }

    /// Returns the shapes of the tensors by their keys, without the prefix that batches use.
    pub fn shapes(&self) -> BTreeMap<String, Vec<i64>> {
        let key = |name: String| name.trim_start_matches(EMPTY).to_string();
        self.tensors().into_iter().map(|(name, tensor)| (key(name), tensor.size())).collect()
    }

    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        // A panic of another thread leaves the tensors unchanged.
        let tensors = self.tensors.lock().unwrap_or_else(PoisonError::into_inner);
        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::files::safetensors::write;

    #[test]
    fn an_empty_prompt_that_is_not_finite_is_refused_by_file_and_tensor() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("empty.safetensors");
        for (number, what) in [
            (f64::NAN, "that are not finite: 1, the first at [0, 1]"),
            (1e39, "beyond what float32 and bfloat16 hold: 1"),
        ] {
            let tensor = Tensor::from_slice(&[0.5, number]).view([1, 2]);
            write(
                &mut File::create(&path).expect("a file"),
                &[("text_embeddings", &tensor)],
                &BTreeMap::new(),
            )
            .expect("room");
            let error =
                SafeTensors::open(&path).and_then(EmptyPrompt::read).expect_err("not finite");
            assert_eq!(error.exit_code(), 40);
            assert!(
                error.to_string().contains(&format!(
                    "empty.safetensors: `text_embeddings` holds numbers {what}"
                )),
                "{error}"
            );
        }
    }
}
