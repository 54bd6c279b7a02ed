//! `fm-dist data show`: the contents of a dataset, and warnings.

mod numbers;
mod picture;
mod scan;
mod text;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;
use tch::Kind;

use super::shards::bytes_of;
use crate::data::group::{Group, SampleTensor};
use crate::data::{DataType, Dataset, Links, OnSmallGroup, Order, SCALE, latents_key};
use crate::error::{Error, Result};
use crate::files::safetensors::is_eight_bits;
use numbers::Range;
use scan::{Found, Mark, scan};

/// Standard deviations of normalized latents. Those of published families lie near 1.
const USUAL_DEVIATION: std::ops::RangeInclusive<f64> = 0.5..=2.0;

/// Options of `fm-dist data show`.
#[derive(Clone, Debug)]
pub struct ShowRequest {
    /// As `data.path`: a folder or an embedded dataset.
    pub path: String,
    pub links: Links,
    /// Samples of one step, to count the steps of an epoch.
    pub global_batch: Option<usize>,
    /// PNG file for the latents of some samples.
    pub samples: Option<PathBuf>,
}

/// Contents of a dataset.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub name: String,
    pub source: String,
    pub licence: String,
    pub data_type: DataType,
    pub samples: u64,
    pub files: usize,
    /// Bytes of the files that are listed; `None` for an embedded dataset.
    pub bytes: Option<u64>,
    pub captions: bool,
    /// Samples whose latents equal those of an earlier sample.
    pub duplicates: u64,
    /// Samples with a number that is not finite.
    pub not_finite: u64,
    pub steps_per_epoch: Option<u64>,
    pub groups: Vec<GroupSummary>,
    pub warnings: Vec<String>,
}

/// Contents of a resolution group.
#[derive(Clone, Debug, Serialize)]
pub struct GroupSummary {
    pub name: String,
    pub samples: usize,
    /// Bytes of its samples' tensors.
    pub bytes: u64,
    pub tensors: BTreeMap<String, TensorSummary>,
}

/// One tensor of the samples of a group.
#[derive(Clone, Debug, Serialize)]
pub struct TensorSummary {
    pub kind: String,
    /// Shape of one sample, of the longest where texts differ.
    pub shape: Vec<i64>,
    /// Shortest and longest first axis, where texts differ.
    pub lengths: Option<(i64, i64)>,
    /// Least and most tokens of a text that count by its mask.
    pub valid_tokens: Option<(i64, i64)>,
    /// Smallest and largest scale of floats of 8 bits.
    pub scales: Option<(f64, f64)>,
    /// Range of the numbers, with their scale; `None` for integers, and if no sample is finite.
    pub values: Option<Values>,
}

/// Range of finite numbers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Values {
    pub min: f64,
    pub max: f64,
    pub mean: f64,
    pub deviation: f64,
}

/// Reads a whole dataset and describes it.
///
/// # Errors
/// Errors of [`Dataset::named`] and of reading; [`Error::Config`] for a global batch of 0.
pub fn show(request: &ShowRequest) -> Result<Summary> {
    if request.global_batch == Some(0) {
        return Err(Error::config("--global-batch", "is 0; expected at least one sample"));
    }
    let dataset = Dataset::named(&request.path, request.links)?;
    let (manifest, found) = (dataset.manifest(), scan(&dataset)?);
    let groups: Vec<GroupSummary> = (dataset.groups().iter().zip(&found))
        .map(|(group, found)| summary_of(&dataset, group, found))
        .collect();
    let not_finite = found.iter().map(|group| group.not_finite).sum();
    let duplicates = duplicates(&found);
    let steps = request.global_batch.map(|size| Order::of(&dataset, size, 0, OnSmallGroup::Stop));
    let mut warnings = warnings(dataset.num_samples(), not_finite, &duplicates);
    warnings.extend(groups.iter().filter_map(|group| unnormalized(group, manifest.data_type)));
    let steps_per_epoch = match steps {
        Some(Err(error)) => {
            warnings.push(error.to_string());
            None
        }
        Some(Ok(order)) => Some(order.batches_per_epoch()),
        None => None,
    };
    if let Some(path) = &request.samples {
        picture::write(&dataset, path)?;
    }
    Ok(Summary {
        name: manifest.name.clone(),
        source: manifest.source.clone(),
        licence: manifest.licence.clone(),
        data_type: manifest.data_type,
        samples: dataset.num_samples(),
        files: manifest.files.len(),
        bytes: bytes_on_disk(&dataset),
        captions: dataset.captions().is_some(),
        duplicates: duplicates.len() as u64,
        not_finite,
        steps_per_epoch,
        groups,
        warnings,
    })
}

fn summary_of(dataset: &Dataset, group: &Group, found: &Found) -> GroupSummary {
    let describe = |(key, tensor): (&String, &SampleTensor)| {
        let scales = found.ranges.get(&format!("{key}{SCALE}")).and_then(Range::ends);
        let summary = TensorSummary {
            kind: word_of(tensor.kind),
            shape: tensor.shape.clone(),
            lengths: found.lengths.get(key).copied(),
            valid_tokens: found.valid_tokens.get(key).copied(),
            scales: scales.filter(|_| is_eight_bits(tensor.kind)),
            values: found.ranges.get(key).and_then(values),
        };
        (key.clone(), summary)
    };
    let tensors = group.layout.iter().map(describe).collect();
    GroupSummary {
        name: group.name.clone(),
        samples: group.sample_ids.len(),
        bytes: group.sample_ids.iter().map(|id| bytes_of(&dataset.sample_layout(*id))).sum(),
        tensors,
    }
}

/// Returns the word of PyTorch for a kind.
fn word_of(kind: Kind) -> String {
    let word = match kind {
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        Kind::Float => "float32",
        Kind::Double => "float64",
        Kind::Float8e4m3fn => "float8_e4m3fn",
        Kind::Float8e5m2 => "float8_e5m2",
        Kind::Int => "int32",
        other => return format!("{other:?}").to_lowercase(),
    };
    word.into()
}

fn values(range: &Range) -> Option<Values> {
    let ((min, max), moments) = (range.ends()?, range.moments());
    let (mean, deviation) = (moments.mean()?, moments.standard_deviation()?);
    Some(Values { min, max, mean, deviation })
}

/// A sample whose latents are those of another one.
struct Duplicate {
    sample: u64,
    of: u64,
}

/// Returns the samples that repeat an earlier one's latents, in the order of samples.
fn duplicates(found: &[Found]) -> Vec<Duplicate> {
    let mut latents: Vec<(Mark, u64)> =
        found.iter().flat_map(|group| &group.latents).map(|(id, mark)| (*mark, *id)).collect();
    latents.sort_unstable();
    let same = latents.chunk_by(|a, b| a.0 == b.0);
    let mut repeated: Vec<Duplicate> = same
        .flat_map(|same| same[1..].iter().map(|(_, id)| Duplicate { sample: *id, of: same[0].1 }))
        .collect();
    repeated.sort_unstable_by_key(|duplicate| duplicate.sample);
    repeated
}

fn warnings(samples: u64, not_finite: u64, duplicates: &[Duplicate]) -> Vec<String> {
    let mut warnings = Vec::new();
    if not_finite > 0 {
        warnings.push(format!(
            "{not_finite} of {samples} samples hold numbers that are not finite; data.on_bad = \
             \"skip\" trains without them"
        ));
    }
    if let Some(Duplicate { sample, of }) = duplicates.first() {
        let count = duplicates.len();
        warnings.push(format!(
            "{count} of {samples} samples have the latents of another sample: sample {sample} those \
             of sample {of}{}",
            if count > 1 { ", …" } else { "" }
        ));
    }
    warnings
}

/// Returns a warning if the latents of a group look as if they were not normalized.
fn unnormalized(group: &GroupSummary, data_type: DataType) -> Option<String> {
    let deviation = group.tensors.get(latents_key(data_type))?.values?.deviation;
    (!USUAL_DEVIATION.contains(&deviation)).then(|| {
        format!(
            "the latents of group {} have a standard deviation of {deviation:.3}; those normalized \
             by the VAE's factors have one near 1",
            group.name
        )
    })
}

/// Returns the bytes of all listed files.
fn bytes_on_disk(dataset: &Dataset) -> Option<u64> {
    let bytes = |path: &str| Some(fs::metadata(dataset.path().join(path)).ok()?.len());
    dataset.manifest().paths().map(bytes).sum()
}
