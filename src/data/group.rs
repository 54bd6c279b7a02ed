//! Resolution groups: the sets of samples that can share a batch.

use std::collections::BTreeMap;

use tch::Kind;

use super::DataType;
use super::manifest;
use crate::error::{Error, Result};
use crate::files::safetensors::{SafeTensors, TensorInfo, is_eight_bits};

/// Kind and shape of one sample's tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleTensor {
    pub kind: Kind,
    pub shape: Vec<i64>,
    /// True if samples differ in their first axis; `shape` then has that of the longest sample.
    pub unequal: bool,
}

/// One sample's tensors, by key.
pub type Layout = BTreeMap<String, SampleTensor>;

/// Samples of equal shapes, from which batches are made.
#[derive(Clone, Debug, Default)]
pub struct Group {
    pub name: String,
    pub data_type: DataType,
    /// Ids of the samples that can be trained on, ascending.
    pub sample_ids: Vec<u64>,
    /// Ids of the samples that are never trained on, ascending.
    pub held_out: Vec<u64>,
    pub layout: Layout,
}

impl SampleTensor {
    /// True if samples of both can share a batch.
    fn fits(&self, other: &SampleTensor) -> bool {
        let unequal = self.unequal && other.unequal;
        let shape = |tensor: &SampleTensor| tensor.shape[usize::from(unequal)..].to_vec();
        (self.kind, self.unequal) == (other.kind, other.unequal) && shape(self) == shape(other)
    }

    /// Describes the tensor: its kind, and its shape with `?` for a length that varies.
    fn shown(&self) -> String {
        let axis = |(place, axis): (usize, &i64)| match place {
            0 if self.unequal => "?".to_string(),
            _ => axis.to_string(),
        };
        let axes: Vec<String> = self.shape.iter().enumerate().map(axis).collect();
        format!("{:?} [{}]", self.kind, axes.join(", "))
    }
}

impl Group {
    /// Returns kind and shape of one sample's latents, `[C, (F,) H, W]`, as files hold them.
    ///
    /// # Panics
    /// If the group has none; a dataset has no such group.
    pub fn latents(&self) -> &SampleTensor {
        self.layout.get(latents_key(self.data_type)).expect("a group of a dataset has latents")
    }

    /// True if samples of both can share a batch.
    pub(super) fn fits(&self, other: &Group) -> bool {
        let fits = |(key, tensor): (&String, &SampleTensor)| {
            other.layout.get(key).is_some_and(|other| tensor.fits(other))
        };
        self.data_type == other.data_type
            && self.layout.len() == other.layout.len()
            && self.layout.iter().all(fits)
    }

    /// Takes over the longest texts of another file of the group.
    pub(super) fn lengthen(&mut self, layout: &Layout) {
        for (key, tensor) in layout.iter().filter(|(_, tensor)| tensor.unequal) {
            if let Some(known) = self.layout.get_mut(key) {
                known.shape[0] = known.shape[0].max(tensor.shape[0]);
            }
        }
    }
}

/// Returns the key under which the reference expects the latents of a type of data.
pub fn latents_key(data_type: DataType) -> &'static str {
    match data_type {
        DataType::Image => "image_latents",
        DataType::Video => "video_latents",
    }
}

/// Returns the kinds of the file's tensors, and their shapes without the first axis.
///
/// # Errors
/// [`Error::Data`] if a tensor does not have `rows` rows, unless `is_unequal` is true for its key.
pub(super) fn layout_of(
    file: &SafeTensors,
    rows: u64,
    word: &str,
    is_unequal: impl Fn(&str) -> bool,
) -> Result<Layout> {
    let mut layout = Layout::new();
    for TensorInfo { name, kind, shape, .. } in file.tensors() {
        if !is_unequal(name) && shape.first().is_none_or(|&found| found as u64 != rows) {
            let what = format!(
                "`{name}` has shape {shape:?}, but {} says {rows} {word}",
                manifest::FILE_NAME
            );
            return Err(Error::data(file.path(), what));
        }
        let shape = shape.get(1..).unwrap_or_default().to_vec();
        layout.insert(name.clone(), SampleTensor { kind: *kind, shape, unequal: false });
    }
    Ok(layout)
}

/// Checks that the latents of the type of data exist, as floats with the right number of axes.
pub(super) fn check_latents(layout: &Layout, data_type: DataType) -> Result<(), String> {
    let (key, axes) = (
        latents_key(data_type),
        if data_type == DataType::Image { "[C, H, W]" } else { "[C, F, H, W]" },
    );
    let Some(SampleTensor { kind, shape, .. }) = layout.get(key) else {
        let keys: Vec<&str> = layout.keys().map(String::as_str).collect();
        return Err(format!(
            "holds no `{key}`, which {} data need; it has {}",
            data_type.word(),
            keys.join(", ")
        ));
    };
    if shape.len() != axes.split(' ').count() || !is_float(*kind) {
        return Err(format!("`{key}` is {kind:?} {shape:?} a sample; expected floats {axes}"));
    }
    Ok(())
}

/// Checks that the file agrees with its group, as an earlier file defined it.
pub(super) fn check_same(
    file: &SafeTensors,
    layout: &Layout,
    first: &SafeTensors,
    group: &Group,
) -> Result<()> {
    let first = first.path().display();
    let differs = |what: String| {
        Err(Error::data(file.path(), format!("{what} of the same group `{}`", group.name)))
    };
    for (key, tensor) in layout {
        match group.layout.get(key) {
            None => return differs(format!("holds `{key}`, which is not in {first}")),
            Some(other) if !tensor.fits(other) => {
                return differs(format!(
                    "`{key}` is {} a sample, but {} in {first}",
                    tensor.shown(),
                    other.shown()
                ));
            }
            Some(_) => {}
        }
    }
    match group.layout.keys().find(|key| !layout.contains_key(*key)) {
        Some(key) => differs(format!("holds no `{key}`, which is in {first}")),
        None => Ok(()),
    }
}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double) || is_eight_bits(kind)
}
