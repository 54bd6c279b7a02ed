//! Resolution groups: the sets of samples that can share a batch.

use std::collections::BTreeMap;

use tch::Kind;

use super::DataType;
use super::manifest;
use crate::error::{Error, Result};
use crate::files::safetensors::{SafeTensors, TensorInfo};

/// Kind and shape of one sample's tensors, by key.
pub type Layout = BTreeMap<String, (Kind, Vec<i64>)>;

/// Samples of equal shapes, from which batches are made.
#[derive(Clone, Debug, Default)]
pub struct Group {
    pub name: String,
    /// Ids, ascending.
    pub sample_ids: Vec<u64>,
    pub layout: Layout,
}

/// Returns the key under which the reference expects the latents of a type of data.
pub(super) fn latents_key(data_type: DataType) -> &'static str {
    match data_type {
        DataType::Image => "image_latents",
        DataType::Video => "video_latents",
    }
}

/// Returns the kinds and shapes of one row of the file, after checking that every tensor has `rows`
/// rows.
pub(super) fn layout_of(file: &SafeTensors, rows: u64, word: &str) -> Result<Layout> {
    let mut layout = Layout::new();
    for TensorInfo { name, kind, shape, .. } in file.tensors() {
        if shape.first().is_none_or(|&found| found as u64 != rows) {
            let what = format!(
                "`{name}` has shape {shape:?}, but {} says {rows} {word}",
                manifest::FILE_NAME
            );
            return Err(Error::data(file.path(), what));
        }
        layout.insert(name.clone(), (*kind, shape[1..].to_vec()));
    }
    Ok(layout)
}

/// Checks that the latents of the type of data exist, as floats with the right number of axes.
pub(super) fn check_latents(layout: &Layout, data_type: DataType) -> Result<(), String> {
    let (key, axes) = (
        latents_key(data_type),
        if data_type == DataType::Image { "[C, H, W]" } else { "[C, F, H, W]" },
    );
    let Some((kind, shape)) = layout.get(key) else {
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
    for (key, (kind, shape)) in layout {
        match group.layout.get(key) {
            None => return differs(format!("holds `{key}`, which is not in {first}")),
            Some((other_kind, other_shape)) if (kind, shape) != (other_kind, other_shape) => {
                return differs(format!(
                    "`{key}` is {kind:?} {shape:?} a sample, but {other_kind:?} {other_shape:?} in {first}"
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
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}
