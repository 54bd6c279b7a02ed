//! Folders that are no dataset yet: the command that makes one of them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::files::contents::IMPORT;

/// Levels of folders below the given one, and entries of all of them, that are looked at.
const MOST_LEVELS: usize = 6;
const MOST_ENTRIES: usize = 4096;
/// Bytes of a list of samples in which its names are searched.
const LIST_BYTES: u64 = 1 << 16;

/// A key of NeMo AutoModel's list of samples.
const WORD: &[u8] = b"\"shards\"";

/// A mark of a folder, in the order in which they are trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    Nemo,
    DiffusionPipe,
    AiToolkit,
    SimpleTuner,
    Musubi,
    Pickles,
    SafeTensors,
}

/// Returns the command that makes a dataset of a folder without `dataset.json`: an import of
/// another trainer's cache, or the description of its files. `None` if it holds neither.
pub fn way_to_a_dataset(folder: &Path) -> Option<String> {
    way_to_import(folder).or_else(|| {
        let plain = marks_of(folder).contains(&Mark::SafeTensors);
        plain.then(|| {
            format!(
                "the folder holds safetensors files, which `fm-dist data index {}` describes as a \
                 dataset",
                folder.display()
            )
        })
    })
}

/// Returns the command that imports a folder of another trainer's cache; `None` if it is none.
pub fn way_to_import(folder: &Path) -> Option<String> {
    let shown = folder.display();
    let import = |trainer: &str, from: &str| {
        format!(
            "the folder is a cache of {trainer}, of which `fm-dist data import --from {from} {shown} \
             --out DIR` makes a dataset"
        )
    };
    Some(match marks_of(folder).into_iter().find(|mark| *mark != Mark::SafeTensors)? {
        Mark::Nemo => import("NeMo AutoModel", "nemo"),
        Mark::DiffusionPipe => import("diffusion-pipe", "diffusion-pipe"),
        Mark::AiToolkit => import("ai-toolkit", "ai-toolkit"),
        Mark::SimpleTuner => import("SimpleTuner", "simpletuner"),
        Mark::Musubi => import("musubi-tuner", "musubi"),
        Mark::SafeTensors => return None,
        Mark::Pickles => format!("the folder holds pickles, which are never read; {IMPORT}"),
    })
}

fn marks_of(folder: &Path) -> BTreeSet<Mark> {
    let mut marks = BTreeSet::new();
    look(folder, MOST_LEVELS, &mut { MOST_ENTRIES }, &mut marks);
    marks
}

/// Collects the marks of a folder and of those below it; what cannot be listed has none.
fn look(folder: &Path, levels: usize, entries_left: &mut usize, marks: &mut BTreeSet<Mark>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Some(left) = entries_left.checked_sub(1) else { return };
        *entries_left = left;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        // Links are not followed.
        let is_folder = entry.file_type().is_ok_and(|found| found.is_dir());
        marks.extend(if is_folder { mark_of_folder(&name) } else { mark_of_file(&path, &name) });
        if is_folder && levels > 1 {
            look(&path, levels - 1, entries_left, marks);
        }
    }
}

fn mark_of_folder(name: &str) -> Option<Mark> {
    matches!(name, "_latent_cache" | "_t_e_cache").then_some(Mark::AiToolkit)
}

fn mark_of_file(path: &Path, name: &str) -> Option<Mark> {
    match name.rsplit_once('.')? {
        ("metadata", "json") => lists_shards(path).then_some(Mark::Nemo),
        ("metadata", "db") => Some(Mark::DiffusionPipe),
        (stem, "json") => {
            stem.starts_with("aspect_ratio_bucket_indices").then_some(Mark::SimpleTuner)
        }
        (_, "meta") => Some(Mark::Nemo),
        (stem, "safetensors") if stem.ends_with("_te") => Some(Mark::Musubi),
        (_, "safetensors") => Some(Mark::SafeTensors),
        (_, "pt") => Some(Mark::Pickles),
        _ => None,
    }
}

/// True if a `metadata.json` is that of NeMo AutoModel.
fn lists_shards(path: &Path) -> bool {
    // Opening a FIFO would block.
    if !fs::metadata(path).is_ok_and(|found| found.is_file()) {
        return false;
    }
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LIST_BYTES).read_to_end(&mut text));
    read.is_ok() && text.windows(WORD.len()).any(|word| word == WORD)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The way from a folder with these files.
    fn way(files: &[&str]) -> Option<String> {
        let root = tempfile::tempdir().expect("a folder");
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
            fs::write(path, "{\"shards\": []}").expect("a file");
        }
        let way = way_to_a_dataset(root.path())?;
        Some(way.replace(&root.path().display().to_string(), "HERE"))
    }

    #[test]
    fn a_cache_is_told_by_its_files_with_the_command_that_imports_it() {
        for (files, from) in [
            (&["metadata.json", "metadata_shard_0000.json", "512x512/ab.pt"][..], "nemo"),
            (&["ab.meta"], "nemo"),
            (&["cat_0512x0512_wan.safetensors", "cat_wan_te.safetensors"], "musubi"),
            (&["cat.png", "_latent_cache/cat_x.safetensors"], "ai-toolkit"),
            (&["cache/wan/cache_1x512x512x1/latents/metadata.db"], "diffusion-pipe"),
            (&["vae/ab.pt", "aspect_ratio_bucket_indices_x.json"], "simpletuner"),
        ] {
            let command = format!("`fm-dist data import --from {from} HERE --out DIR`");
            assert!(way(files).is_some_and(|way| way.contains(&command)), "{files:?}");
        }
        assert!(way(&["ab.pt"]).is_some_and(|way| way.contains("data import --from nemo")));
    }

    #[test]
    fn plain_files_are_to_be_indexed_and_others_are_nothing() {
        let plain = way(&["a.safetensors", "more/b.safetensors"]).expect("safetensors");
        assert!(plain.contains("`fm-dist data index HERE`"), "{plain}");
        assert_eq!(way(&["cat.png", "cat.txt"]), None);
        assert_eq!(way_to_a_dataset(Path::new("/no/such/folder")), None);
    }
}
