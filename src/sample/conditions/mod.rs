//! Conditions for generating samples: the dataset's named conditions, or a file of conditions.

mod file;
mod prompt;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::assembly::attention::TEXT;
use crate::data::{Batch, Conditions, DataType, Dataset, EMPTY};
use crate::error::{Error, Result};
use crate::files::safetensors::SafeTensors;
use crate::flow::{
    CfgDropoutValue, DataShapes, FlowMatchingSettings, ModelAdapter, Shapes, TaskType, check_keys,
    dropped_keys,
};
use crate::model::{Architecture, SampleShapes};
use file::{data_type_of, same_rows, shape_of, task_type_of};

/// Prefix of the keys of negative conditions, from which classifier-free guidance leads away.
const NEGATIVE: &str = "negative.";
/// Key of the noise to start from.
const NOISE: &str = "noise";
/// Key of the clean frame with which a video starts.
const CONDITION_LATENTS: &str = "condition_latents";

/// The start of generation: conditions, one row for each prompt, and the noise or the shape to draw
/// it in.
pub struct Origin {
    /// Path that messages name.
    path: PathBuf,
    /// One name for each row.
    pub names: Vec<String>,
    /// Conditions `[N, …]`, by the adapter's keys.
    tensors: BTreeMap<String, Tensor>,
    /// Conditions of the unconditional pass; empty if conditions are dropped as in training.
    negative: BTreeMap<String, Tensor>,
    /// The empty prompt's rows, which may take the place of dropped conditions, by the names that
    /// batches give them.
    empty_prompt: Vec<(String, Tensor)>,
    /// `[N, C, (F,) H, W]` f32.
    noise: Option<Tensor>,
    /// Shape of one sample, `[C, (F,) H, W]`.
    pub shape: Vec<i64>,
    data_type: DataType,
    pub task_type: TaskType,
}

impl Origin {
    /// Takes the dataset's conditions, in the given shape or that of the first resolution group
    /// beside them.
    pub fn from_dataset(dataset: &Dataset, conditions: Conditions, shape: Option<&[i64]>) -> Self {
        let (group, empty_prompt) = (dataset.sampled_group(), dataset.empty_prompt_tensors());
        Origin {
            path: dataset.path().into(),
            names: conditions.names,
            tensors: lengthened(conditions.tensors, &empty_prompt),
            negative: BTreeMap::new(),
            empty_prompt,
            noise: None,
            shape: shape.map_or_else(|| dataset.latent_shape(group), <[i64]>::to_vec),
            data_type: group.data_type,
            task_type: TaskType::TextToVideo,
        }
    }

    /// Reads a safetensors file of conditions `[N, …]`, optionally with their `negative.`
    /// counterparts and the initial `noise`. Without noise, the shape is the given one or else that
    /// of the dataset, which need not exist otherwise.
    ///
    /// # Errors
    /// [`Error::Data`] naming the file, the key and what was expected; [`Error::Config`] if the
    /// shape is unknown.
    pub fn from_file(
        path: &Path,
        shape: Option<&[i64]>,
        dataset: impl FnOnce() -> Result<Dataset>,
    ) -> Result<Self> {
        let file = SafeTensors::open(path)?;
        let mut tensors = BTreeMap::new();
        for info in file.tensors() {
            tensors.insert(info.name.clone(), file.read_finite(&info.name)?);
        }
        let rows = same_rows(path, &tensors)?;
        let noise = tensors.remove(NOISE).map(|noise| noise.to_kind(Kind::Float));
        let (negative, tensors) = tensors
            .into_iter()
            .partition::<BTreeMap<_, _>, _>(|(key, _)| key.starts_with(NEGATIVE));
        let negative: BTreeMap<_, _> = negative
            .into_iter()
            .map(|(key, tensor)| (key[NEGATIVE.len()..].to_string(), tensor))
            .collect();
        if let Some(key) = negative.keys().find(|key| !tensors.contains_key(*key)) {
            return Err(Error::data(
                path,
                format!("holds `{NEGATIVE}{key}`, but no `{key}` that it is the counterpart of"),
            ));
        }
        let shape = shape_of(path, noise.as_ref(), shape, dataset)?;
        let data_type = data_type_of(&file, &shape)?;
        let task_type = task_type_of(&file)?;
        let names = (0..rows).map(|row| row.to_string()).collect();
        Ok(Origin {
            path: path.into(),
            names,
            tensors,
            negative,
            empty_prompt: Vec::new(),
            noise,
            shape,
            data_type,
            task_type,
        })
    }

    /// Refuses conditions that the model or its adapter cannot take.
    ///
    /// # Errors
    /// [`Error::Data`] or [`Error::Config`] naming the file, the key and what was expected.
    pub fn check(&self, model: &dyn Architecture, adapter: &dyn ModelAdapter) -> Result<()> {
        if self.task_type == TaskType::ImageToVideo {
            if !adapter.takes_first_frame() {
                let what = format!(
                    "task_type is \"i2v\", but the {} adapter as it is set gives its model no first frame; leave task_type \
                     out, and for Wan give `{CONDITION_LATENTS}` with their mask",
                    adapter.name()
                );
                return Err(Error::data(&self.path, what));
            }
            self.check_frames()?;
            model.check_image_to_video().map_err(|error| self.named(error))?;
        }
        let negative = self
            .tensors
            .iter()
            .chain(&self.negative)
            .map(|(key, tensor)| (key.clone(), tensor.shallow_clone()));
        for tensors in [&self.tensors, &negative.collect()] {
            let shapes = SampleShapes::of_batch(self.names.len() as i64, &self.shape, tensors);
            let data = DataShapes {
                latents: &self.shape,
                sample: &shapes.of,
                empty_prompt: &Shapes::new(),
            };
            check_keys(adapter, &without_training(), data)
                .map_err(|what| Error::data(&self.path, what))?;
            model.check_data(&shapes).map_err(|error| self.named(error))?;
        }
        // Masks, too: those of the conditions would hide what is guided away from.
        let keys = dropped_keys(adapter, CfgDropoutValue::EmptyPrompt);
        let unmatched =
            |key: &&&str| self.tensors.contains_key(**key) && !self.negative.contains_key(**key);
        match keys.iter().find(unmatched) {
            Some(key) if self.has_negative() => {
                let what = format!(
                    "holds negative conditions, but no `{NEGATIVE}{key}`; expected one for every condition and its mask"
                );
                Err(Error::data(&self.path, what))
            }
            _ => Ok(()),
        }
    }

    /// Returns the number of tokens of a condition's text; `None` without one.
    pub fn text_tokens(&self) -> Option<i64> {
        self.tensors.get(TEXT).and_then(|text| text.size().get(1).copied())
    }

    /// True if samples can be shown: grey or coloured pictures.
    pub fn is_of_pictures(&self) -> bool {
        matches!(*self.shape, [1 | 3, _, _])
    }

    pub fn has_negative(&self) -> bool {
        !self.negative.is_empty()
    }

    pub fn has_noise(&self) -> bool {
        self.noise.is_some()
    }

    /// Returns the conditions of these rows.
    pub fn batch(&self, rows: &[i64]) -> Batch {
        let mut batch = self.batch_of(&self.tensors, rows);
        let empty_prompt = self.empty_prompt.iter();
        batch.tensors.extend(empty_prompt.map(|(name, row)| (name.clone(), row.shallow_clone())));
        batch
    }

    /// Returns the same rows with the negative conditions in place of the others; `None` without
    /// any.
    pub fn negative(&self, rows: &[i64]) -> Option<Batch> {
        let chosen = |(key, tensor): (&String, &Tensor)| {
            (key.clone(), self.negative.get(key).unwrap_or(tensor).shallow_clone())
        };
        let batch = || self.batch_of(&self.tensors.iter().map(chosen).collect(), rows);
        self.has_negative().then(batch)
    }

    fn batch_of(&self, tensors: &BTreeMap<String, Tensor>, rows: &[i64]) -> Batch {
        let rows = Tensor::from_slice(rows);
        let tensors = tensors
            .iter()
            .map(|(key, tensor)| (key.clone(), tensor.index_select(0, &rows)))
            .collect();
        Batch { tensors, data_type: self.data_type, sample_ids: Vec::new(), bad_samples: 0 }
    }

    /// Returns the given noise of these rows, `[rows, C, (F,) H, W]` f32, if any.
    pub fn noise(&self, rows: &[i64]) -> Option<Tensor> {
        self.noise.as_ref().map(|noise| noise.index_select(0, &Tensor::from_slice(rows)))
    }

    /// Returns for image-to-video the clean frame with which these rows start, with zeros after it:
    /// `[rows, C, F, H, W]`.
    pub fn clean_latents(&self, rows: &[i64]) -> Option<Tensor> {
        let frame = self
            .tensors
            .get(CONDITION_LATENTS)
            .filter(|_| self.task_type == TaskType::ImageToVideo)?;
        let frame = frame.index_select(0, &Tensor::from_slice(rows));
        Some(frame.constant_pad_nd([0, 0, 0, 0, 0, self.shape[1] - 1]))
    }

    /// Marks the samples that are image-to-video, `[rows]` boolean: all or none.
    pub fn image_to_video(&self, rows: i64) -> Tensor {
        Tensor::full(
            [rows],
            i64::from(self.task_type == TaskType::ImageToVideo),
            (Kind::Bool, Device::Cpu),
        )
    }

    /// Returns one label for each row: the conditions' `labels`, or the row's number.
    pub fn labels(&self, rows: &[i64]) -> Tensor {
        let rows = Tensor::from_slice(rows);
        self.tensors
            .get("labels")
            .map_or_else(|| rows.shallow_clone(), |labels| labels.index_select(0, &rows))
            .to_kind(Kind::Int64)
    }

    /// Adds the path of the conditions to an error of an adapter or a model about a batch.
    pub fn named(&self, error: Error) -> Error {
        match error {
            Error::Data { what, .. } => Error::data(&self.path, what),
            Error::Config { problems, .. } => {
                Error::Config { source_name: self.path.display().to_string(), problems }
            }
            other => other,
        }
    }

    /// Refuses to be guided away from an empty prompt that there is not.
    ///
    /// # Errors
    /// [`Error::Data`].
    pub fn check_empty_prompt(&self) -> Result<()> {
        if !self.empty_prompt.is_empty() {
            return Ok(());
        }
        let what = format!(
            "holds no negative conditions, and guidance leads away from the empty prompt, by which \
             flow_matching.cfg_dropout_value replaced dropped ones; add its conditions as `{NEGATIVE}<key>`"
        );
        Err(Error::data(&self.path, what))
    }

    /// Refuses image-to-video without its first frame.
    fn check_frames(&self) -> Result<()> {
        if self.task_type != TaskType::ImageToVideo {
            return Ok(());
        }
        let [channels, frames, height, width] = *self.shape else {
            return Err(Error::data(
                &self.path,
                format!(
                    "task_type is \"i2v\", which is for videos [C, F, H, W], not {:?}",
                    self.shape
                ),
            ));
        };
        if frames == 1 {
            let what = "task_type is \"i2v\", but a video of one frame would be given whole; leave task_type out";
            return Err(Error::data(&self.path, what));
        }
        let found = self.tensors.get(CONDITION_LATENTS).map(Tensor::size);
        match found.as_deref() {
            Some(&[_, c, 1, h, w]) if (c, h, w) == (channels, height, width) => Ok(()),
            Some(found) => {
                let what = format!(
                    "`{CONDITION_LATENTS}` has shape {found:?}; expected one frame, [N, {channels}, 1, {height}, {width}]"
                );
                Err(Error::data(&self.path, what))
            }
            None => {
                let what = format!(
                    "task_type is \"i2v\", but there is no `{CONDITION_LATENTS}` [N, C, 1, H, W] to begin with"
                );
                Err(Error::data(&self.path, what))
            }
        }
    }
}

/// Pads the conditions that are shorter than the empty prompt's, `[N, L, …]`, with zeros to its
/// length: it may take their place.
fn lengthened(
    mut conditions: BTreeMap<String, Tensor>,
    empty_prompt: &[(String, Tensor)],
) -> BTreeMap<String, Tensor> {
    for (name, row) in empty_prompt {
        let Some(tensor) = conditions.get_mut(name.trim_start_matches(EMPTY)) else { continue };
        let (axes, [length, needed]) = match (&tensor.size()[..], row.size().first()) {
            ([_, length, rest @ ..], Some(needed)) => (rest.len(), [*length, *needed]),
            _ => continue,
        };
        if length < needed {
            let padding = [vec![0; 2 * axes], vec![0, needed - length]].concat();
            *tensor = tensor.constant_pad_nd(&padding[..]);
        }
    }
    conditions
}

/// Returns settings without dropout and masks, which only training uses.
fn without_training() -> FlowMatchingSettings {
    FlowMatchingSettings {
        apply_loss_mask: false,
        cfg_dropout_prob: 0.0,
        ..FlowMatchingSettings::default()
    }
}
