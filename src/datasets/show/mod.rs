//! `fm-dist data show`: the contents of a dataset, and warnings.

mod picture;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use serde::Serialize;
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::data::group::Group;
use crate::data::{DataType, Dataset, Moments, OnSmallGroup, Order, latents_key};
use crate::error::{Error, Result};
use crate::files::sha256;
use crate::tensor::bytes;

/// Standard deviations of normalized latents. Those of published families lie near 1.
const USUAL_DEVIATION: std::ops::RangeInclusive<f64> = 0.5..=2.0;

/// Options of `fm-dist data show`.
#[derive(Clone, Debug)]
pub struct ShowRequest {
    /// As `data.path`: a folder or an embedded dataset.
    pub path: String,
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
    /// Range of the numbers; `None` for integers, and if no sample is finite.
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
    let dataset = Dataset::named(&request.path)?;
    let manifest = dataset.manifest();
    let mut seen = Seen::default();
    let groups: Vec<GroupSummary> =
        dataset.groups().iter().map(|group| seen.group(&dataset, group)).collect::<Result<_>>()?;
    let steps = request.global_batch.map(|size| Order::of(&dataset, size, 0, OnSmallGroup::Stop));
    let mut warnings = seen.warnings(dataset.num_samples());
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
        duplicates: seen.duplicates,
        not_finite: seen.not_finite,
        steps_per_epoch,
        groups,
        warnings,
    })
}

/// Findings in the samples read so far.
#[derive(Default)]
struct Seen {
    latents: BTreeSet<String>,
    duplicates: u64,
    not_finite: u64,
}

impl Seen {
    fn group(&mut self, dataset: &Dataset, group: &Group) -> Result<GroupSummary> {
        let mut ranges: BTreeMap<String, Range> = BTreeMap::new();
        let mut lengths: BTreeMap<String, (i64, i64)> = BTreeMap::new();
        let latents = latents_key(group.data_type);
        for &id in &group.sample_ids {
            for (key, tensor) in dataset.sample_layout(id).iter().filter(|(_, t)| t.unequal) {
                let length = tensor.shape[0];
                let (min, max) = lengths.entry(key.clone()).or_insert((length, length));
                (*min, *max) = ((*min).min(length), (*max).max(length));
            }
            let sample = match dataset.sample(id) {
                Err(_) if !dataset.is_finite(id)? => {
                    self.not_finite += 1;
                    continue;
                }
                sample => sample?,
            };
            let hash = sha256::hex(Sha256::new_with_prefix(bytes(&sample[latents])));
            self.duplicates += u64::from(!self.latents.insert(hash));
            for (key, tensor) in sample.iter().filter(|(_, tensor)| is_float(tensor)) {
                ranges.entry(key.clone()).or_default().add(tensor);
            }
        }
        let described = group.layout.iter().map(|(key, tensor)| {
            let summary = TensorSummary {
                kind: format!("{:?}", tensor.kind),
                shape: tensor.shape.clone(),
                lengths: lengths.get(key).copied(),
                values: ranges.get(key).and_then(Range::values),
            };
            (key.clone(), summary)
        });
        let tensors = described.collect();
        Ok(GroupSummary { name: group.name.clone(), samples: group.sample_ids.len(), tensors })
    }

    fn warnings(&self, samples: u64) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.not_finite > 0 {
            warnings.push(format!(
                "{} of {samples} samples hold numbers that are not finite; data.on_bad = \"skip\" \
                 trains without them",
                self.not_finite
            ));
        }
        if self.duplicates > 0 {
            warnings.push(format!(
                "{} of {samples} samples have the latents of another sample",
                self.duplicates
            ));
        }
        warnings
    }
}

/// Range of the numbers seen so far.
#[derive(Default)]
struct Range {
    moments: Moments,
    ends: Option<(f64, f64)>,
}

impl Range {
    fn add(&mut self, tensor: &Tensor) {
        if tensor.numel() == 0 {
            return;
        }
        let (min, max) = (tensor.min().double_value(&[]), tensor.max().double_value(&[]));
        let (least, most) = self.ends.unwrap_or((min, max));
        self.ends = Some((least.min(min), most.max(max)));
        self.moments = self.moments.merge(Moments::from_tensor(tensor));
    }

    fn values(&self) -> Option<Values> {
        let (min, max) = self.ends?;
        let (mean, deviation) = (self.moments.mean()?, self.moments.standard_deviation()?);
        Some(Values { min, max, mean, deviation })
    }
}

fn is_float(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
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
