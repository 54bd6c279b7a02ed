//! Several files that together hold one set of tensors, each under a name of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::SafeTensors;
use super::source::Source;
use crate::data::descriptors::kept_open;
use crate::error::{Error, Result, one_line};

/// A line a tensor: enough for a hundred thousand of them.
const MAX_INDEX_BYTES: u64 = 16 << 20;
/// Names that a message lists before it only counts.
const LISTED_NAMES: usize = 20;

/// Which file of a folder holds which tensor, as `<stem>.safetensors.index.json` says.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Opened files whose headers have been checked.
#[derive(Debug)]
pub struct Shards {
    path: PathBuf,
    files: Vec<SafeTensors>,
}

impl Shards {
    /// `files` of the folder `path`.
    ///
    /// # Errors
    /// As [`SafeTensors::open`].
    pub fn open(path: &Path, files: impl IntoIterator<Item = String>) -> Result<Self> {
        let paths: Vec<PathBuf> = files.into_iter().map(|name| path.join(name)).collect();
        let (kept, on_demand) = paths.split_at(kept_open(paths.len()));
        let kept = kept.iter().map(SafeTensors::open);
        let files = kept.chain(on_demand.iter().map(SafeTensors::open_on_demand)).collect::<Result<_>>()?;
        Ok(Shards { path: path.into(), files })
    }

    /// `<stem>.safetensors`, or the files that `<stem>.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::Data`] if there is neither, or the index is malformed; as [`SafeTensors::open`].
    pub fn of_stem(folder: &Path, stem: &str) -> Result<Self> {
        let (single, index) = (format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json"));
        match (folder.join(&single).exists(), folder.join(&index).exists()) {
            (true, _) => Shards::open(folder, [single]),
            (false, true) => Shards::open(folder, files_of(&folder.join(index))?),
            (false, false) => Err(Error::data(folder, format!("holds neither {single} nor {index}"))),
        }
    }

    /// Compares names, shapes and kinds with what is `expected`; names that contain one of `ignored` may be there unasked.
    ///
    /// # Errors
    /// A text that lists every missing, unexpected and misshapen tensor.
    pub fn check(&self, expected: &BTreeMap<String, &[i64]>, kinds: &[Kind], ignored: &[&str]) -> Result<(), String> {
        let mut found = BTreeMap::new();
        let mut doubled = Vec::new();
        for info in self.files.iter().flat_map(SafeTensors::tensors) {
            if found.insert(info.name.as_str(), info).is_some() {
                doubled.push(info.name.clone());
            }
        }
        let missing = expected.keys().filter(|name| !found.contains_key(name.as_str())).cloned().collect();
        let wanted = |name: &str| expected.contains_key(name) || ignored.iter().any(|part| name.contains(part));
        let unexpected = found.keys().filter(|name| !wanted(name)).map(ToString::to_string).collect();
        let unfit = found.values().filter_map(|info| {
            let shape = *expected.get(&info.name)?;
            let fits = kinds.contains(&info.kind) && info.shape == shape;
            (!fits).then(|| format!("{} is {:?} {:?} instead of {} {shape:?}", info.name, info.kind, info.shape, named(kinds)))
        });
        let unfit = unfit.collect();
        let lists = [("missing", missing), ("unexpected", unexpected), ("in two files", doubled), ("of another shape or kind", unfit)];
        let texts: Vec<String> = lists.into_iter().filter_map(|(what, names)| listed(what, names)).collect();
        if texts.is_empty() { Ok(()) } else { Err(texts.join("; ")) }
    }

    /// One whole tensor, on the CPU.
    ///
    /// # Errors
    /// [`Error::Data`] if no file holds it; as [`SafeTensors::read`].
    pub fn read(&self, name: &str) -> Result<Tensor> {
        self.holding(name)?.read(name)
    }

    /// The same, of finite numbers alone.
    ///
    /// # Errors
    /// As [`read`](Self::read); [`Error::Data`] naming the file and the first number that is not finite.
    pub fn read_finite(&self, name: &str) -> Result<Tensor> {
        self.holding(name)?.read_finite(name)
    }

    fn holding(&self, name: &str) -> Result<&SafeTensors> {
        let holding = self.files.iter().find(|file| file.holds(name));
        holding.ok_or_else(|| Error::data(&self.path, format!("holds no tensor `{name}`")))
    }
}

/// The files of an index, each once.
fn files_of(index: &Path) -> Result<BTreeSet<String>> {
    let (source, bytes) = Source::open(index)?;
    if bytes > MAX_INDEX_BYTES {
        return Err(Error::data(index, format!("is longer than the {MAX_INDEX_BYTES} bytes allowed")));
    }
    let mut text = vec![0; bytes as usize];
    source.opened(index)?.read_at(&mut text, 0).map_err(Error::storage(index, "read"))?;
    let parsed: Index = serde_json::from_slice(&text).map_err(|error| Error::data(index, one_line(&error.to_string())))?;
    let files: BTreeSet<String> = parsed.weight_map.into_values().collect();
    let plain = |name: &String| matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
    match files.iter().find(|name| !plain(name)) {
        Some(name) => Err(Error::data(index, format!("names {name:?}, which is no file beside it"))),
        None => Ok(files),
    }
}

fn named(kinds: &[Kind]) -> String {
    kinds.iter().map(|kind| format!("{kind:?}")).collect::<Vec<_>>().join(" or ")
}

fn listed(what: &str, names: Vec<String>) -> Option<String> {
    let more = names.len().saturating_sub(LISTED_NAMES);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty()).then(|| format!("{what}: {}{tail}", names[..names.len() - more].join(", ")))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use tch::Device;

    use super::*;
    use crate::data::safetensors::write;

    #[test]
    fn d9_d10_whatever_does_not_fit_is_listed_and_nothing_is_broadcast_or_converted() {
        let folder = tempfile::tempdir().expect("a folder");
        let tensors = [("broadcast", [1, 1], Kind::Float), ("converted", [2, 2], Kind::BFloat16), ("renamed", [2, 2], Kind::Float)];
        let tensors = tensors.map(|(name, shape, kind)| (name, Tensor::ones(shape, (kind, Device::Cpu))));
        let named = tensors.each_ref().map(|(name, tensor)| (*name, tensor));
        let mut file = File::create(folder.path().join("a.safetensors")).expect("a file");
        write(&mut file, &named, &BTreeMap::new()).expect("room");
        let shards = Shards::open(folder.path(), ["a.safetensors".to_string()]).expect("a sound file");
        let shapes = [("broadcast", [64, 64]), ("converted", [2, 2]), ("named", [2, 2])];
        let expected = shapes.iter().map(|(name, shape)| (name.to_string(), &shape[..])).collect();
        let said = shards.check(&expected, &[Kind::Float], &[]).expect_err("nothing of it fits");
        let lists = "missing: named; unexpected: renamed; of another shape or kind: broadcast is Float [1, 1] instead of Float [64, 64], \
                     converted is BFloat16 [2, 2] instead of Float [2, 2]";
        assert_eq!(said, lists);
    }

    #[test]
    fn an_index_names_files_beside_it_and_is_no_longer_than_any_real_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.safetensors.index.json");
        let refusal = || Shards::of_stem(folder.path(), "model").expect_err("a hostile index").to_string();
        for name in ["../model.safetensors", "/etc/passwd", "..", "a/b.safetensors"] {
            fs::write(&path, serde_json::json!({"weight_map": {"w": name}}).to_string()).expect("a file");
            assert!(refusal().ends_with("which is no file beside it"), "{}", refusal());
        }
        File::create(&path).and_then(|file| file.set_len(MAX_INDEX_BYTES + 1)).expect("a file");
        assert!(refusal().ends_with("is longer than the 16777216 bytes allowed"), "{}", refusal());
    }
}
