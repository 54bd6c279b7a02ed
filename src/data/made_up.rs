//! Synthetic datasets for tests, in temporary folders.

use std::collections::BTreeMap;
use std::fs::File;

use tch::{Device, Kind, Tensor};

use super::manifest;
use crate::files::safetensors::write;
use crate::files::sha256::HashingWriter;

/// A file of a dataset to write: name, group, tensors.
pub(super) type Part<'a> = (&'a str, &'a str, Vec<(&'a str, Tensor)>);

/// Writes a dataset of images; `conditions` are names, and a file of that name.
pub(super) fn written(
    parts: &[Part<'_>],
    conditions: Option<(&[&str], Tensor)>,
) -> tempfile::TempDir {
    written_as(1, parts, conditions)
}

/// Writes a dataset of images in a version of the format.
pub(super) fn written_as(
    version: u64,
    parts: &[Part<'_>],
    conditions: Option<(&[&str], Tensor)>,
) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let save = |name: &str, tensors: &[(&str, Tensor)]| {
        let mut file =
            HashingWriter::new(File::create(folder.path().join(name)).expect("a new file"));
        let tensors: Vec<(&str, &Tensor)> =
            tensors.iter().map(|(key, tensor)| (*key, tensor)).collect();
        write(&mut file, &tensors, &BTreeMap::new()).expect("a sound file");
        file.finish().1
    };
    let files: Vec<serde_json::Value> = parts
        .iter()
        .map(|(name, group, tensors)| {
            let (sha256, samples) = (save(name, tensors), tensors[0].1.size()[0]);
            serde_json::json!({"path": name, "samples": samples, "group": group, "sha256": sha256})
        })
        .collect();
    let mut manifest = serde_json::json!({
        "format": "fm-dist dataset", "version": version, "name": "made up", "source": "a test", "licence": "CC0",
        "data_type": "image", "files": files,
    });
    if let Some((names, tensor)) = conditions {
        let sha256 = save("conditions.safetensors", &[("text_embeddings", tensor)]);
        manifest["conditions"] =
            serde_json::json!({"path": "conditions.safetensors", "names": names, "sha256": sha256});
    }
    std::fs::write(folder.path().join(manifest::FILE_NAME), manifest.to_string())
        .expect("a new file");
    folder
}

/// Returns `samples` images, each filled with its own number, counted from `first`.
pub(super) fn images(first: i64, samples: i64, side: i64) -> Tensor {
    Tensor::arange_start(first, first + samples, (Kind::Float, Device::Cpu))
        .view([-1, 1, 1, 1])
        .repeat([1, 1, side, side])
}

/// Writes nine numbered images in three files of two groups, and two conditions.
pub(super) fn two_groups() -> tempfile::TempDir {
    let labels = |first: i64, samples: i64| {
        Tensor::arange_start(first, first + samples, (Kind::Int64, Device::Cpu))
    };
    let part = |first, samples, side| {
        vec![("image_latents", images(first, samples, side)), ("labels", labels(first, samples))]
    };
    let parts = [
        ("a.safetensors", "2x2", part(0, 4, 2)),
        ("b.safetensors", "3x3", part(4, 3, 3)),
        ("c.safetensors", "2x2", part(7, 2, 2)),
    ];
    let conditions = Tensor::ones([2, 5, 8], (Kind::Half, Device::Cpu));
    written(&parts, Some((&["zero", "one"], conditions)))
}
