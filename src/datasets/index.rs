//! `fm-dist data index`: describes a folder of safetensors files as a dataset. The files stay as
//! they are; only `dataset.json` is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::About;
use super::shards::{free_name, of_group, sizes, unequal_texts};
use super::write::Written;
use crate::data::group::{Layout, SampleTensor};
use crate::data::{
    DATASET_FILE, DataType, Dataset, LENGTHS, Links, SCALE, latents_key, way_to_import,
};
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::files::safetensors::{Content, SafeTensors};
use crate::files::sha256;

/// Files of the empty prompt, of conditions for samples, which only a dataset that is written
/// describes, and of captions, if a folder has them.
const EMPTY_PROMPTS: [&str; 2] = ["empty.safetensors", "empty_prompt.safetensors"];
const CONDITIONS: &str = "conditions.safetensors";
const CAPTIONS: &str = "captions.jsonl";

/// Options of `fm-dist data index`.
#[derive(Clone, Debug)]
pub struct IndexRequest {
    pub folder: PathBuf,
    pub links: Links,
    pub about: About,
}

/// Writes `dataset.json` of a folder of files that hold samples stacked along the first axis, or
/// one sample each.
///
/// # Errors
/// [`Error::Data`] if there are no samples, a file is malformed or has no latents, or the folder is
/// a dataset already.
pub fn index(request: &IndexRequest) -> Result<Written> {
    let folder = &request.folder;
    let target = folder.join(DATASET_FILE);
    if target.exists() {
        let what = "exists already; move it away to describe the folder anew: names of conditions, repeats \
                    and licence stand in it alone";
        return Err(Error::data(target, what));
    }
    let files = walk(folder, &has_ending("safetensors"), request.links)?;
    let empty_prompt = EMPTY_PROMPTS.into_iter().find(|name| folder.join(name).is_file());
    let others: Vec<PathBuf> =
        empty_prompt.into_iter().chain([CONDITIONS]).map(|name| folder.join(name)).collect();
    let samples = files.iter().filter(|path| !others.contains(path));
    let found = samples.map(|path| File::open(path, folder)).collect::<Result<Vec<_>>>()?;
    let Some(first) = found.first() else {
        let what = format!("holds no safetensors file of samples{}", imported(folder));
        return Err(Error::data(folder, what));
    };
    if let Some(other) = found.iter().find(|file| file.data_type != first.data_type) {
        let what = format!(
            "holds {} data, but {} holds {}; put them into folders of their own",
            other.data_type.word(),
            first.path.display(),
            first.data_type.word()
        );
        return Err(Error::data(&other.path, what));
    }
    let entries = entries(folder, &found)?;
    let description = request.about.describe(folder, first.data_type);
    let mut document = json!({
        "format": "fm-dist dataset",
        "version": 2,
        "name": description.name,
        "source": description.source,
        "licence": description.licence,
        "data_type": first.data_type,
        "files": entries,
    });
    let empty_prompt = empty_prompt.map(|name| ("empty_prompt", name));
    for (key, name) in empty_prompt.into_iter().chain([("captions", CAPTIONS)]) {
        let path = folder.join(name);
        if path.is_file() {
            document[key] = json!({"path": name, "sha256": sha256::of_file(&path)?});
        }
    }
    let text = serde_json::to_string_pretty(&document).expect("texts and numbers are JSON");
    // What it cannot read is not described.
    let dataset = Dataset::described_by(folder, &text, request.links)?;
    if let Some(captions) = dataset.captions() {
        captions.check_count(dataset.num_samples())?;
    }
    replace_file(&target, |out| writeln!(out, "{text}"))?;
    let (samples, groups) = (dataset.num_samples() as usize, dataset.groups().len());
    Ok(Written { samples, files: found.len(), groups })
}

/// A file of samples.
struct File {
    path: PathBuf,
    data_type: DataType,
    samples: u64,
    /// True if it holds one sample without an axis of samples.
    single: bool,
    layout: Layout,
    sha256: String,
}

impl File {
    fn open(path: &Path, folder: &Path) -> Result<Self> {
        let file = SafeTensors::open_as(path, Content::Samples)?;
        let latents = [DataType::Image, DataType::Video].into_iter().find_map(|data_type| {
            Some((data_type, file.info(latents_key(data_type)).ok()?.shape.clone()))
        });
        let Some((data_type, shape)) = latents else {
            let names: Vec<&str> =
                file.tensors().iter().map(|info| info.name.as_str()).take(20).collect();
            let what = format!(
                "holds neither `image_latents` nor `video_latents`; it has {}{}",
                names.join(", "),
                imported(folder)
            );
            return Err(Error::data(path, what));
        };
        let axes = if data_type == DataType::Image { 3 } else { 4 };
        let single = shape.len() == axes;
        if !single && shape.len() != axes + 1 {
            let what = format!(
                "`{}` has shape {shape:?}; expected {axes} axes, or {} with one for the samples",
                latents_key(data_type),
                axes + 1
            );
            return Err(Error::data(path, what));
        }
        let samples = if single { 1 } else { shape[0] as u64 };
        let mut hash = Sha256::new();
        file.for_each_piece(|piece| hash.update(piece))?;
        let layout = layout(&file, usize::from(!single));
        let sha256 = sha256::hex(hash);
        Ok(File { path: path.into(), data_type, samples, single, layout, sha256 })
    }
}

/// Returns the end of a message, which says how a cache of another trainer becomes a dataset.
fn imported(folder: &Path) -> String {
    way_to_import(folder).map(|way| format!("; {way}")).unwrap_or_default()
}

/// Returns the shapes of one sample: those of the tensors without their first `skipped` axes.
fn layout(file: &SafeTensors, skipped: usize) -> Layout {
    let beside = |name: &str| name.ends_with(LENGTHS) || name.ends_with(SCALE);
    let of_samples = file.tensors().iter().filter(|info| !beside(&info.name));
    let described = of_samples.map(|info| {
        let unequal = file.holds(&format!("{}{LENGTHS}", info.name));
        let shape = info.shape.get(skipped..).unwrap_or_default();
        let shape = if unequal { [&[0], shape].concat() } else { shape.to_vec() };
        (info.name.clone(), SampleTensor { kind: info.kind, shape, unequal })
    });
    described.collect()
}

/// Returns the files' entries, with groups named by the size of their latents.
fn entries(folder: &Path, files: &[File]) -> Result<Vec<Value>> {
    let (mut groups, mut names) = (BTreeMap::new(), BTreeSet::new());
    let singles = || files.iter().filter(|file| file.single).map(|file| &file.layout);
    let unequal = unequal_texts(singles);
    let entry = |file: &File| {
        let unequal = if file.single { unequal.clone() } else { BTreeSet::new() };
        let group = groups
            .entry(format!("{:?}", of_group(&file.layout, &unequal)))
            .or_insert_with(|| free_name(&mut names, &sizes(&file.layout, file.data_type)))
            .clone();
        let relative = file.path.strip_prefix(folder).expect("found below the folder");
        let relative = relative.to_str();
        let relative =
            relative.ok_or_else(|| Error::data(&file.path, "has a name that is not UTF-8"))?;
        let mut entry = json!({
            "path": relative, "samples": file.samples, "group": group, "sha256": file.sha256,
        });
        if file.single {
            entry["single"] = true.into();
            if !unequal.is_empty() {
                entry["unequal"] = true.into();
            }
        }
        Ok(entry)
    };
    files.iter().map(entry).collect()
}

/// Adds the files below `folder` with this ending, sorted; hidden ones and links to folders are
/// left out.
pub(super) fn find(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) -> Result<()> {
    find_if(folder, &has_ending(ending), found)
}

fn has_ending(ending: &str) -> impl Fn(&Path) -> bool {
    move |path| path.extension().is_some_and(|own| own == ending)
}

/// As [`find`], but all files for which `wanted` is true.
pub(super) fn find_if(
    folder: &Path,
    wanted: &dyn Fn(&Path) -> bool,
    found: &mut Vec<PathBuf>,
) -> Result<()> {
    found.extend(walk(folder, wanted, Links::Inside)?);
    Ok(())
}

/// Returns the files below `folder` for which `wanted` is true, sorted, without hidden ones. Links
/// to files are taken, those to folders only if links are followed.
fn walk(folder: &Path, wanted: &dyn Fn(&Path) -> bool, links: Links) -> Result<Vec<PathBuf>> {
    let mut walk = Walk { wanted, links, visited: BTreeSet::new(), found: Vec::new() };
    walk.enter(folder)?;
    Ok(walk.found)
}

/// A walk through folders.
struct Walk<'w> {
    wanted: &'w dyn Fn(&Path) -> bool,
    links: Links,
    /// Real paths of folders, so that links in a circle end and no file is found twice.
    visited: BTreeSet<PathBuf>,
    found: Vec<PathBuf>,
}

impl Walk<'_> {
    fn enter(&mut self, folder: &Path) -> Result<()> {
        let real = folder.canonicalize().map_err(Error::storage(folder, "find"))?;
        if !self.visited.insert(real) {
            return Ok(());
        }
        let listed = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let mut entries = listed.map_err(Error::storage(folder, "list"))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let kind = entry.file_type().map_err(Error::storage(&path, "inspect"))?;
            let is_linked = self.links == Links::Followed && kind.is_symlink() && path.is_dir();
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            if kind.is_dir() || is_linked {
                self.enter(&path)?;
            } else if (self.wanted)(&path) {
                self.found.push(path);
            }
        }
        Ok(())
    }
}
