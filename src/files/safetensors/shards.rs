//! Several files that together hold one set of tensors, each tensor in one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::source::{Source, open_error};
use super::{Content, SafeTensors, TensorInfo};
use crate::error::{Error, Result};
use crate::files::contents::no_json;
use crate::files::descriptors::kept_open;

/// Maximum size of an index, enough for a hundred thousand tensors.
const MAX_INDEX_BYTES: u64 = 16 << 20;
/// Number of names that a message lists before it only counts.
const LISTED_NAMES: usize = 20;
/// The same number if a hint already explains them.
const EXPLAINED_NAMES: usize = 3;

/// The file of each tensor, as `<stem>.safetensors.index.json` lists them.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Open files whose headers have been checked.
#[derive(Debug)]
pub struct Shards {
    path: PathBuf,
    files: Vec<SafeTensors>,
}

impl Shards {
    /// Opens `files` of the folder `path`.
    ///
    /// # Errors
    /// As [`SafeTensors::open`].
    pub fn open(path: &Path, files: impl IntoIterator<Item = String>) -> Result<Self> {
        Shards::open_as(path, files, Content::Tensors)
    }

    fn open_as(
        path: &Path,
        files: impl IntoIterator<Item = String>,
        content: Content,
    ) -> Result<Self> {
        let open = |path: &PathBuf| SafeTensors::open_as(path, content);
        let paths: Vec<PathBuf> = files.into_iter().map(|name| path.join(name)).collect();
        let (kept, on_demand) = paths.split_at(kept_open(paths.len()));
        let kept = kept.iter().map(open);
        let on_demand = on_demand.iter().map(|path| open(path)?.on_demand());
        let files = kept.chain(on_demand).collect::<Result<_>>()?;
        Ok(Shards { path: path.into(), files })
    }

    /// Opens the weights in the files that `<stem>.safetensors.index.json` names, or
    /// `<stem>.safetensors` if there is no index: as in diffusers, a single file beside an index is
    /// not read.
    ///
    /// # Errors
    /// [`Error::Data`] if there is neither, naming the files found instead, or if the index is
    /// malformed; errors of [`SafeTensors::open`].
    pub fn open_stem(folder: &Path, stem: &str) -> Result<Self> {
        let (single, index) =
            (format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json"));
        if folder.join(&index).exists() {
            Shards::open_as(folder, files_of(&folder.join(index))?, Content::Weights)
        } else if folder.join(&single).exists() {
            Shards::open_as(folder, [single], Content::Weights)
        } else {
            fs::metadata(folder).map_err(|error| open_error(folder, error))?;
            Err(Error::data(
                folder,
                format!("holds neither {single} nor {index}{}", instead(folder, stem)),
            ))
        }
    }

    /// Compares names, shapes and kinds with those `expected`; additional names are allowed if they
    /// contain one of `ignored`.
    ///
    /// # Errors
    /// A text that lists every missing, unexpected and misshapen tensor.
    pub fn check(
        &self,
        expected: &BTreeMap<String, &[i64]>,
        kinds: &[Kind],
        ignored: &[&str],
    ) -> Result<(), String> {
        let mut found = BTreeMap::new();
        let mut doubled = Vec::new();
        for info in self.files.iter().flat_map(SafeTensors::tensors) {
            if found.insert(info.name.as_str(), info).is_some() {
                doubled.push(info.name.clone());
            }
        }
        if let Some(hint) = other_names(&found, expected) {
            return Err(hint);
        }
        let missing =
            expected.keys().filter(|name| !found.contains_key(name.as_str())).cloned().collect();
        let wanted = |name: &str| {
            expected.contains_key(name) || ignored.iter().any(|part| name.contains(part))
        };
        let unexpected =
            found.keys().filter(|name| !wanted(name)).map(ToString::to_string).collect();
        let unfit = found.values().filter_map(|info| {
            let shape = *expected.get(&info.name)?;
            let fits = kinds.contains(&info.kind) && info.shape == shape;
            (!fits).then(|| {
                format!(
                    "{} is {:?} {:?} instead of {} {shape:?}",
                    info.name,
                    info.kind,
                    info.shape,
                    named(kinds)
                )
            })
        });
        let unfit = unfit.collect();
        let lists = [
            ("missing", missing),
            ("unexpected", unexpected),
            ("in two files", doubled),
            ("of another shape or kind", unfit),
        ];
        let texts: Vec<String> = lists
            .into_iter()
            .filter_map(|(what, names)| listed(what, names, LISTED_NAMES))
            .collect();
        if texts.is_empty() { Ok(()) } else { Err(texts.join("; ")) }
    }

    /// True if a file holds a tensor of this name.
    pub fn holds(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.holds(name))
    }

    /// Returns one whole tensor, on the CPU.
    ///
    /// # Errors
    /// [`Error::Data`] if no file holds it; errors of [`SafeTensors::read`].
    pub fn read(&self, name: &str) -> Result<Tensor> {
        self.holding(name)?.read(name)
    }

    /// As [`read`](Self::read), but refuses numbers that are not finite.
    ///
    /// # Errors
    /// Errors of [`read`](Self::read); [`Error::Data`] naming the file and the first number that is
    /// not finite.
    pub fn read_finite(&self, name: &str) -> Result<Tensor> {
        self.holding(name)?.read_finite(name)
    }

    fn holding(&self, name: &str) -> Result<&SafeTensors> {
        let holding = self.files.iter().find(|file| file.holds(name));
        holding.ok_or_else(|| Error::data(&self.path, format!("holds no tensor `{name}`")))
    }
}

/// Describes weights in a folder under names other than `<stem>`, and what to do about them.
fn instead(folder: &Path, stem: &str) -> String {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names: BTreeSet<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let variant = |name: &str| {
        let rest = name.strip_prefix(stem)?.strip_prefix('.')?;
        let index = || rest.strip_prefix("safetensors.index.")?.strip_suffix(".json");
        let variant = rest
            .strip_suffix(".safetensors")
            .or_else(|| rest.strip_suffix(".safetensors.index.json"))
            .or_else(index)?;
        let ours = if name.ends_with(".json") { ".safetensors.index.json" } else { ".safetensors" };
        Some(format!(", but the variant `{variant}`; rename {name} to {stem}{ours}"))
    };
    // An index names its shards, so the index of a variant is enough.
    if let Some(text) = names
        .iter()
        .filter(|name| name.ends_with(".json"))
        .chain(&names)
        .find_map(|name| variant(name))
    {
        return text;
    }
    let weights: Vec<&str> =
        names.iter().map(String::as_str).filter(|name| name.ends_with(".safetensors")).collect();
    match weights[..] {
        [] => "; it holds no safetensors".into(),
        _ if weights.iter().any(|name| name.starts_with(&format!("{stem}-"))) => {
            ", but shards without their index; fetch that too".into()
        }
        [one] => format!(
            ", but {one}; if its names are diffusers' ones, rename it; if it is another program's single file, convert it once with \
             diffusers: from_single_file(\"{one}\").save_pretrained(\"FOLDER\")"
        ),
        _ => format!(
            ", but {}",
            weights.iter().take(EXPLAINED_NAMES).copied().collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Returns a hint if no name is the model's: a common prefix, a LoRA's names, or another program's.
fn other_names(
    found: &BTreeMap<&str, &TensorInfo>,
    expected: &BTreeMap<String, &[i64]>,
) -> Option<String> {
    if expected.is_empty() || expected.keys().any(|name| found.contains_key(name.as_str())) {
        return None;
    }
    if let Some(prefix) = prefix(found, expected) {
        return Some(format!(
            "all names begin with `{prefix}`, the model's do not; save the tensors without it, in Python: safetensors.torch.save_file(\
             {{n.removeprefix(\"{prefix}\"): t for n, t in safetensors.torch.load_file(\"IN\").items()}}, \"OUT\")"
        ));
    }
    let what = if found.keys().any(|name| name.contains("lora_")) {
        "holds the weights of a LoRA, not of a model; merge them into the model and save that"
    } else {
        "holds none of the model's tensors: it is of another model, or in another program's form, which diffusers' from_single_file converts"
    };
    let lists = [
        ("expected", expected.keys().cloned().collect()),
        ("found", found.keys().map(ToString::to_string).collect()),
    ];
    let lists: Vec<String> = lists
        .into_iter()
        .filter_map(|(what, names)| listed(what, names, EXPLAINED_NAMES))
        .collect();
    Some(format!("{what}; {}", lists.join("; ")))
}

/// Returns the text before the names, if it is the same for at least half of the expected names.
fn prefix<'f>(
    found: &BTreeMap<&'f str, &TensorInfo>,
    expected: &BTreeMap<String, &[i64]>,
) -> Option<&'f str> {
    let before = |name: &&'f str, wanted: &String| {
        name.strip_suffix(wanted.as_str()).filter(|prefix| prefix.ends_with('.'))
    };
    let candidates =
        expected.keys().filter_map(|wanted| found.keys().find_map(|name| before(name, wanted)));
    let explained = |prefix: &str| {
        expected
            .keys()
            .filter(|name| found.contains_key(format!("{prefix}{name}").as_str()))
            .count()
    };
    candidates.take(LISTED_NAMES).find(|prefix| 2 * explained(prefix) >= expected.len())
}

/// Returns the files of an index, each once.
fn files_of(index: &Path) -> Result<BTreeSet<String>> {
    let (source, bytes) = Source::open(index)?;
    if bytes > MAX_INDEX_BYTES {
        return Err(Error::data(
            index,
            format!("is longer than the {MAX_INDEX_BYTES} bytes allowed"),
        ));
    }
    let mut text = vec![0; bytes as usize];
    source.opened(index)?.read_at(&mut text, 0).map_err(Error::storage(index, "read"))?;
    let parsed: Index = serde_json::from_slice(&text)
        .map_err(|error| Error::data(index, no_json(&text, &error)))?;
    let files: BTreeSet<String> = parsed.weight_map.into_values().collect();
    let plain = |name: &String| {
        matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(_)])
    };
    match files.iter().find(|name| !plain(name)) {
        Some(name) => {
            Err(Error::data(index, format!("names {name:?}, which is no file beside it")))
        }
        None => Ok(files),
    }
}

fn named(kinds: &[Kind]) -> String {
    kinds.iter().map(|kind| format!("{kind:?}")).collect::<Vec<_>>().join(" or ")
}

fn listed(what: &str, names: Vec<String>, most: usize) -> Option<String> {
    let more = names.len().saturating_sub(most);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty()).then(|| format!("{what}: {}{tail}", names[..names.len() - more].join(", ")))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tch::Device;

    use super::*;
    use crate::files::safetensors::write;

    #[test]
    fn d9_d10_whatever_does_not_fit_is_listed_and_nothing_is_broadcast_or_converted() {
        let folder = tempfile::tempdir().expect("a folder");
        let tensors = [
            ("broadcast", [1, 1], Kind::Float),
            ("converted", [2, 2], Kind::BFloat16),
            ("renamed", [2, 2], Kind::Float),
        ];
        let tensors =
            tensors.map(|(name, shape, kind)| (name, Tensor::ones(shape, (kind, Device::Cpu))));
        let named = tensors.each_ref().map(|(name, tensor)| (*name, tensor));
        let mut file = File::create(folder.path().join("a.safetensors")).expect("a file");
        write(&mut file, &named, &BTreeMap::new()).expect("room");
        let shards =
            Shards::open(folder.path(), ["a.safetensors".to_string()]).expect("a sound file");
        let shapes = [("broadcast", [64, 64]), ("converted", [2, 2]), ("named", [2, 2])];
        let expected = shapes.iter().map(|(name, shape)| (name.to_string(), &shape[..])).collect();
        let said = shards.check(&expected, &[Kind::Float], &[]).expect_err("nothing of it fits");
        let lists = "missing: named; unexpected: renamed; of another shape or kind: broadcast is Float [1, 1] instead of Float [64, 64], \
                     converted is BFloat16 [2, 2] instead of Float [2, 2]";
        assert_eq!(said, lists);
    }

    fn saved(path: &Path, name: &str, value: f64) {
        let tensor = Tensor::full([2], value, (Kind::Float, Device::Cpu));
        write(&mut File::create(path).expect("a file"), &[(name, &tensor)], &BTreeMap::new())
            .expect("room");
    }

    #[test]
    fn an_index_wins_over_a_single_file_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        saved(&path("model.safetensors"), "w", 1.0);
        let read = || {
            Shards::open_stem(folder.path(), "model")
                .and_then(|shards| shards.read("w"))
                .expect("a sound folder")
        };
        assert_eq!(read().double_value(&[0]), 1.0);
        saved(&path("model-1.safetensors"), "w", 2.0);
        fs::write(
            path("model.safetensors.index.json"),
            r#"{"weight_map": {"w": "model-1.safetensors"}}"#,
        )
        .expect("a file");
        assert_eq!(read().double_value(&[0]), 2.0);
    }

    #[test]
    fn weights_under_another_name_are_told_with_what_to_do() {
        let folder = tempfile::tempdir().expect("a folder");
        let refusal =
            || Shards::open_stem(folder.path(), "model").expect_err("no such weights").to_string();
        let put = |name: &str| fs::write(folder.path().join(name), "").expect("a file");
        let take = |name: &str| fs::remove_file(folder.path().join(name)).expect("it was there");
        assert!(refusal().ends_with("holds neither model.safetensors nor model.safetensors.index.json; it holds no safetensors"));
        for (name, hint) in [
            (
                "model.fp16.safetensors",
                ", but the variant `fp16`; rename model.fp16.safetensors to model.safetensors",
            ),
            (
                "model.safetensors.index.fp16.json",
                "rename model.safetensors.index.fp16.json to model.safetensors.index.json",
            ),
            (
                "model.bf16.safetensors.index.json",
                "rename model.bf16.safetensors.index.json to model.safetensors.index.json",
            ),
            (
                "model-00001-of-00002.safetensors",
                ", but shards without their index; fetch that too",
            ),
            (
                "flux1-dev.safetensors",
                ", but flux1-dev.safetensors; if its names are diffusers' ones, rename it; if it is another program's",
            ),
        ] {
            put(name);
            assert!(refusal().contains(hint), "{}", refusal());
            take(name);
        }
    }

    #[test]
    fn names_that_are_all_others_are_told_in_one_hint() {
        let folder = tempfile::tempdir().expect("a folder");
        let said = |name: &str| {
            saved(&folder.path().join("a.safetensors"), name, 1.0);
            let shards =
                Shards::open(folder.path(), ["a.safetensors".to_string()]).expect("a sound file");
            shards.check(
                &BTreeMap::from([("blocks.0.w".to_string(), &[2][..])]),
                &[Kind::Float],
                &[],
            )
        };
        said("blocks.0.w").expect("the model's name");
        for prefix in ["transformer.", "model.diffusion_model.", "module."] {
            let hint = said(&format!("{prefix}blocks.0.w")).expect_err("behind a prefix");
            assert!(
                hint.starts_with(&format!(
                    "all names begin with `{prefix}`, the model's do not; save"
                )),
                "{hint}"
            );
        }
        let hint = said("double_blocks.0.w").expect_err("another program's");
        let lists = "from_single_file converts; expected: blocks.0.w; found: double_blocks.0.w";
        assert!(
            hint.starts_with("holds none of the model's tensors") && hint.ends_with(lists),
            "{hint}"
        );
        assert!(
            said("blocks.0.lora_A.weight")
                .expect_err("a LoRA")
                .starts_with("holds the weights of a LoRA")
        );
    }

    #[test]
    fn an_index_names_files_beside_it_and_is_no_longer_than_any_real_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.safetensors.index.json");
        let refusal =
            || Shards::open_stem(folder.path(), "model").expect_err("a hostile index").to_string();
        for name in ["../model.safetensors", "/etc/passwd", "..", "a/b.safetensors"] {
            fs::write(&path, serde_json::json!({"weight_map": {"w": name}}).to_string())
                .expect("a file");
            assert!(refusal().ends_with("which is no file beside it"), "{}", refusal());
        }
        File::create(&path).and_then(|file| file.set_len(MAX_INDEX_BYTES + 1)).expect("a file");
        assert!(refusal().ends_with("is longer than the 16777216 bytes allowed"), "{}", refusal());
    }
}
