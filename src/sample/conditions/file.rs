//! Reads rows, shape, type of data and task from a file of conditions.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use super::NOISE;
use crate::data::{DataType, Dataset};
use crate::error::{Error, Result};
use crate::files::safetensors::SafeTensors;
use crate::flow::TaskType;

/// Returns the number of rows, which all tensors must share.
pub(super) fn same_rows(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<i64> {
    let mut known: Option<(&str, i64)> = None;
    for (key, tensor) in tensors {
        let unfit = |what: String| {
            Err(Error::data(
                path,
                format!("`{key}` has shape {:?}; expected {what}", tensor.size()),
            ))
        };
        match (tensor.size().first(), known) {
            (None | Some(0), _) => return unfit("[N, …] with a row for each sample".into()),
            (Some(&rows), None) => known = Some((key, rows)),
            (Some(&rows), Some((other, expected))) if rows != expected => {
                return unfit(format!("{expected} rows as in `{other}`"));
            }
            _ => {}
        }
    }
    known.map(|(_, rows)| rows).ok_or_else(|| {
        Error::data(path, "holds no tensors; expected conditions [N, …] under the adapter's keys")
    })
}

/// Returns the shape of one sample `[C, (F,) H, W]`: that of the noise, else `requested` from the
/// command line, else the dataset's.
pub(super) fn shape_of(
    path: &Path,
    noise: Option<&Tensor>,
    requested: Option<&[i64]>,
    dataset: impl FnOnce() -> Result<Dataset>,
) -> Result<Vec<i64>> {
    let Some(noise) = noise else {
        let unknown = |error: Error| {
            let what = format!(
                "{} holds no `{NOISE}`, and the run's dataset cannot tell the latents' shape ({error}); give it",
                path.display()
            );
            Error::config("--shape", what)
        };
        return requested.map_or_else(
            || {
                let dataset = dataset().map_err(unknown)?;
                Ok(dataset.latent_shape(dataset.sampled_group()))
            },
            |requested| Ok(requested.to_vec()),
        );
    };
    let found = noise.size()[1..].to_vec();
    if !matches!(found.len(), 3 | 4) {
        return Err(Error::data(
            path,
            format!(
                "`{NOISE}` has shape {:?}; expected [N, C, H, W] or [N, C, F, H, W]",
                noise.size()
            ),
        ));
    }
    match requested {
        Some(requested) if requested != found => Err(Error::config(
            "--shape",
            format!(
                "is {requested:?}, but `{NOISE}` in {} has samples of {found:?}",
                path.display()
            ),
        )),
        _ => Ok(found),
    }
}

/// Returns the type of data, which follows from the shape; metadata may repeat it.
pub(super) fn data_type_of(file: &SafeTensors, shape: &[i64]) -> Result<DataType> {
    let follows = if shape.len() == 3 { DataType::Image } else { DataType::Video };
    match file.metadata().get("data_type") {
        Some(word) if word != follows.word() => {
            let what = format!(
                "data_type in the metadata is {word:?}, but samples of shape {shape:?} are {:?}",
                follows.word()
            );
            Err(Error::data(file.path(), what))
        }
        _ => Ok(follows),
    }
}

/// Returns the task in the metadata; text-to-video without it.
pub(super) fn task_type_of(file: &SafeTensors) -> Result<TaskType> {
    let word =
        file.metadata().get("task_type").map_or(TaskType::TextToVideo.word(), String::as_str);
    let known = [TaskType::TextToVideo, TaskType::ImageToVideo];
    let unknown = || {
        Error::data(
            file.path(),
            format!("task_type in the metadata is {word:?}, expected \"t2v\" or \"i2v\""),
        )
    };
    known.into_iter().find(|task_type| task_type.word() == word).ok_or_else(unknown)
}
