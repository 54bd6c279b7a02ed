//! The start of a single sample by a prompt.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tch::Tensor;

use super::Origin;
use crate::data::DataType;
use crate::flow::TaskType;

impl Origin {
    /// Takes the conditions of a prompt and those to be guided away from, each `[1, …]` by the
    /// adapter's keys, and the noise to start from, `[1, C, (F,) H, W]`. Without `negative`,
    /// conditions are dropped as in training.
    pub fn from_prompt(
        prompt: &str,
        tensors: BTreeMap<String, Tensor>,
        negative: BTreeMap<String, Tensor>,
        noise: Tensor,
    ) -> Self {
        let shape = noise.size()[1..].to_vec();
        Origin {
            path: PathBuf::from(format!("prompt {prompt:?}")),
            names: vec![prompt.into()],
            tensors,
            negative,
            empty_prompt: Vec::new(),
            data_type: if shape.len() == 3 { DataType::Image } else { DataType::Video },
            shape,
            noise: Some(noise),
            task_type: TaskType::TextToVideo,
        }
    }
}
