//! Conditions for generating samples: the dataset's named conditions, or a file of conditions.

mod file;
mod prompt;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::assembly::attention::TEXT;
use crate::data::{Batch, Conditions, DataType, Dataset};
use crate::error::{Error, Result};
use crate::files::safetensors::SafeTensors;
use crate::flow::{DataShapes, FlowMatchingSettings, ModelAdapter, Shapes, TaskType, check_keys};
use crate::model::{Architecture, SampleShapes};
use file::{data_type_of, same_rows, shape_of, task_type_of};

/// Prefix of the keys of negative conditions, from which classifier-free guidance leads away.
const NEGATIVE: &str = "negative.";
/// Key of the noise to start from.
const NOISE: &str = "noise";
/// Key of the clean frames with which a video starts.
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
        let group = dataset.sampled_group();
        Origin {
            path: dataset.path().into(),
            names: conditions.names,
            tensors: conditions.tensors,
            negative: BTreeMap::new(),
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
        let origin = Origin {
            path: path.into(),
            names,
            tensors,
            negative,
            noise,
            shape,
            data_type,
            task_type,
        };
        origin.check_frames()?;
        Ok(origin)
    }

    /// Refuses conditions that the model or its adapter cannot take.
    ///
    /// # Errors
    /// [`Error::Data`] or [`Error::Config`] naming the file, the key and what was expected.
    pub fn check(&self, model: &dyn Architecture, adapter: &dyn ModelAdapter) -> Result<()> {
        if self.task_type == TaskType::ImageToVideo {
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
        let condition_keys = adapter.condition_keys();
        let unmatched =
            |key: &&&str| self.tensors.contains_key(**key) && !self.negative.contains_key(**key);
        match condition_keys.iter().find(unmatched) {
            Some(key) if self.has_negative() => Err(Error::data(
                &self.path,
                format!(
                    "holds negative conditions, but no `{NEGATIVE}{key}`; expected one for every condition"
                ),
            )),
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
        self.batch_of(&self.tensors, rows)
    }

    /// Returns the unconditional inputs of the same rows: the negative conditions, or zeros under
    /// `condition_keys`, as training drops conditions.
    pub fn unconditional(&self, rows: &[i64], condition_keys: &[&str]) -> Batch {
        let chosen = |(key, tensor): (&String, &Tensor)| {
            let dropped = || {
                if condition_keys.contains(&key.as_str()) {
                    tensor.zeros_like()
                } else {
                    tensor.shallow_clone()
                }
            };
            (
                key.clone(),
                if self.has_negative() {
                    self.negative.get(key).unwrap_or(tensor).shallow_clone()
                } else {
                    dropped()
                },
            )
        };
        self.batch_of(&self.tensors.iter().map(chosen).collect(), rows)
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

    /// Returns for image-to-video the clean frames with which these rows start, with zeros after
    /// them: `[rows, C, F, H, W]`.
    pub fn clean_latents(&self, rows: &[i64]) -> Option<Tensor> {
        let frames = self
            .tensors
            .get(CONDITION_LATENTS)
            .filter(|_| self.task_type == TaskType::ImageToVideo)?;
        let missing = self.shape[1] - frames.size()[2];
        Some(
            frames
                .index_select(0, &Tensor::from_slice(rows))
                .constant_pad_nd([0, 0, 0, 0, 0, missing]),
        )
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

    /// Refuses image-to-video without its first frames.
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
            Some(&[_, c, f, h, w])
                if (c, h, w) == (channels, height, width) && (1..=frames).contains(&f) =>
            {
                Ok(())
            }
            Some(found) => {
                let what = format!(
                    "`{CONDITION_LATENTS}` has shape {found:?}; expected [N, {channels}, 1 to {frames}, {height}, {width}]"
                );
                Err(Error::data(&self.path, what))
            }
            None => {
                let what = format!(
                    "task_type is \"i2v\", but there is no `{CONDITION_LATENTS}` [N, C, F, H, W] to begin with"
                );
                Err(Error::data(&self.path, what))
            }
        }
    }
}

/// Returns settings without dropout and masks, which only training uses.
fn without_training() -> FlowMatchingSettings {
    FlowMatchingSettings {
        apply_loss_mask: false,
        cfg_dropout_prob: 0.0,
        ..FlowMatchingSettings::default()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::adapter::{Arguments, create_adapter};
    use crate::data::Links;
    use crate::files::safetensors::write;
    use crate::model::Dit;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn origin(tensors: &[(&str, &Tensor)], metadata: &[(&str, &str)]) -> Result<Origin> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("conditions.safetensors");
        let metadata =
            metadata.iter().map(|(key, word)| (key.to_string(), word.to_string())).collect();
        write(&mut File::create(&path).expect("a new file"), tensors, &metadata)
            .expect("a sound file");
        Origin::from_file(&path, None, || Dataset::named("/no/such/dataset", Links::Inside))
    }

    /// Returns rows that are each filled with their own number, counted from `first`.
    fn numbered(first: i64, shape: &[i64]) -> Tensor {
        let mut column = vec![1; shape.len()];
        column[0] = -1;
        Tensor::arange_start(first, first + shape[0], FLOAT).view(column.as_slice())
            + Tensor::zeros(shape, FLOAT)
    }

    #[test]
    fn a_video_begins_with_the_frames_given_and_goes_on_with_none() {
        let (noise, frames) =
            (Tensor::zeros([2, 3, 5, 4, 4], FLOAT), numbered(1, &[2, 3, 1, 4, 4]));
        let tensors = [("noise", &noise), ("condition_latents", &frames)];
        let clean = origin(&tensors, &[("task_type", "i2v")])
            .expect("sound conditions")
            .clean_latents(&[1, 0])
            .expect("i2v");
        assert_eq!(clean.size(), [2, 3, 5, 4, 4]);
        assert_eq!(
            clean.select(2, 0).select(0, 0),
            Tensor::full([3, 4, 4], 2.0, FLOAT),
            "row 1 comes first"
        );
        assert_eq!(clean.narrow(2, 1, 4), Tensor::zeros([2, 3, 4, 4, 4], FLOAT));
        assert!(
            origin(&tensors, &[]).expect("sound conditions").clean_latents(&[0]).is_none(),
            "text-to-video has no such frames"
        );
        let error = origin(
            &[("noise", &noise), ("condition_latents", &Tensor::zeros([2, 3, 6, 4, 4], FLOAT))],
            &[("task_type", "i2v")],
        );
        let still = Tensor::zeros([2, 3, 1, 4, 4], FLOAT);
        let whole =
            origin(&[("noise", &still), ("condition_latents", &still)], &[("task_type", "i2v")])
                .err()
                .expect("one frame");
        assert!(
            whole
                .to_string()
                .ends_with("but a video of one frame would be given whole; leave task_type out"),
            "{whole}"
        );
        let text = error.err().expect("too many frames").to_string();
        assert!(
            text.ends_with(
                "`condition_latents` has shape [2, 3, 6, 4, 4]; expected [N, 3, 1 to 5, 4, 4]"
            ),
            "{text}"
        );
    }

    #[test]
    fn rows_are_guided_away_from_their_negatives_or_from_zeros() {
        let (noise, text, mask) = (
            Tensor::zeros([2, 1, 8, 8], FLOAT),
            numbered(1, &[2, 3, 10]),
            Tensor::ones([2, 3], FLOAT),
        );
        let negative = numbered(5, &[2, 4, 10]);
        let plain = [("noise", &noise), ("text_embeddings", &text), ("text_mask", &mask)];
        let dropped = origin(&plain, &[])
            .expect("sound conditions")
            .unconditional(&[1], &["text_embeddings"]);
        assert_eq!(dropped.tensors["text_embeddings"], Tensor::zeros([1, 3, 10], FLOAT));
        assert_eq!(
            dropped.tensors["text_mask"],
            Tensor::ones([1, 3], FLOAT),
            "only conditions are dropped"
        );
        let with_negative = [&plain[..], &[("negative.text_embeddings", &negative)]].concat();
        let origin = origin(&with_negative, &[]).expect("sound conditions");
        let away = origin.unconditional(&[1], &["text_embeddings"]);
        assert_eq!(away.tensors["text_embeddings"], Tensor::full([1, 4, 10], 6.0, FLOAT));
        assert_eq!(
            origin.batch(&[1]).tensors["text_embeddings"],
            Tensor::full([1, 3, 10], 2.0, FLOAT)
        );
    }

    #[test]
    fn every_condition_needs_its_negative_once_one_has_it() {
        let (noise, text, pooled) = (
            Tensor::zeros([2, 1, 8, 8], FLOAT),
            Tensor::ones([2, 3, 10], FLOAT),
            Tensor::ones([2, 6], FLOAT),
        );
        let tensors = [
            ("noise", &noise),
            ("text_embeddings", &text),
            ("negative.text_embeddings", &text),
            ("pooled_prompt_embeds", &pooled),
        ];
        let (origin, adapter) = (
            origin(&tensors, &[]).expect("sound conditions"),
            create_adapter("flux", &Arguments::new()),
        );
        let error = origin
            .check(&Dit::default(), &*adapter.expect("a known one"))
            .expect_err("one negative is missing")
            .to_string();
        let expected = "holds negative conditions, but no `negative.pooled_prompt_embeds`; expected one for every condition";
        assert!(error.ends_with(expected), "{error}");
    }

    #[test]
    fn conditions_without_their_token_axis_are_refused() {
        let (noise, text) = (Tensor::zeros([2, 1, 8, 8], FLOAT), Tensor::ones([2, 10], FLOAT));
        let origin =
            origin(&[("noise", &noise), ("text_embeddings", &text)], &[]).expect("sound numbers");
        let adapter = create_adapter("simple", &Arguments::new()).expect("a known one");
        let error = origin.check(&Dit::default(), &*adapter).expect_err("no tokens").to_string();
        assert!(error.ends_with("`text_embeddings` is [10] a sample, expected [L, D]"), "{error}");
    }
}
