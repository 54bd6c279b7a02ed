//! Caches of other trainers become datasets with the bits that their own readers give, and train.

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::data::{Caption, Dataset, TextPadding};
use fm_dist::datasets::caches::{CacheFormat, ImportRequest, import};
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::run::Resume;
use tempfile::TempDir;

use super::packages::oracle;
use crate::runs::{column, train_in_threads};
use crate::threads::training::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, SAMPLES, Tiny, WAN};

fn imported(from: CacheFormat, source: &Path, out: &Path) -> Dataset {
    let request = ImportRequest {
        from,
        sources: vec![source.into()],
        out: out.into(),
        captions: None,
        // Several files.
        shard_bytes: 8 << 10,
        jobs: 2,
        name: None,
        source: None,
        licence: None,
    };
    let written = import(&request).unwrap();
    assert_eq!((written.samples, written.groups), (SAMPLES as usize, 1), "{}", source.display());
    Dataset::open(out).unwrap()
}

/// Asserts that the batch of all samples holds the expected tensors.
fn assert_batch(dataset: &Dataset, expected: &Path) {
    dataset.verify_hashes().and_then(|()| dataset.verify_numbers()).unwrap();
    let ids: Vec<u64> = (0..SAMPLES as u64).collect();
    let (batch, expected) = (dataset.batch(&ids).unwrap(), SafeTensors::open(expected).unwrap());
    assert!(expected.tensors().len() > 1);
    for info in expected.tensors() {
        let (found, tensor) = (&batch.tensors[&info.name], expected.read(&info.name).unwrap());
        assert_eq!((found.kind(), found.size()), (info.kind, info.shape.clone()), "{}", info.name);
        assert!(found.equal(&tensor), "{} of {}", info.name, dataset.path().display());
    }
    let mut captions = Vec::new();
    let each = |caption: Caption| {
        captions.push(caption.caption);
        Ok(())
    };
    dataset.captions().unwrap().for_each(each).unwrap();
    let numbered: Vec<String> = (0..SAMPLES).map(|index| format!("caption {index}")).collect();
    assert_eq!(captions, numbered);
}

fn assert_trains(family: &Tiny, data: &Path, root: &Path, overrides: &[&str]) {
    let sets = [&["max_steps=10"], overrides].concat();
    let config = family.config(data, &root.join("run"), &sets);
    let run = train_in_threads(&config, &Resume::Never, 2).unwrap();
    assert_eq!(column(&run, "loss").len(), 10, "{}", data.display());
    fs::remove_dir_all(root.join("run")).unwrap();
}

fn caches() -> (TempDir, PathBuf) {
    let root = TempDir::new().unwrap();
    let path = root.path().to_path_buf();
    oracle("caches.py", &[path.to_str().unwrap()]);
    (root, path)
}

#[test]
fn caches_of_nemo_give_the_batches_of_its_own_collate_and_train() {
    let (_folder, root) = caches();
    let families = [
        ("flux", FLUX, vec![]),
        ("flux2", FLUX2, vec![]),
        ("qwen_image", QWEN_IMAGE, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("wan", WAN, vec![]),
        ("hunyuanvideo", HUNYUAN_VIDEO15, vec![]),
    ];
    for (name, family, overrides) in families {
        let (source, expected) =
            (root.join("nemo").join(name), root.join(format!("nemo/{name}.safetensors")));
        // The paths in its list lead nowhere then.
        let moved = root.join(format!("moved-{name}"));
        fs::rename(source, &moved).unwrap();
        let data = root.join(format!("data-{name}"));
        assert_batch(&imported(CacheFormat::Nemo, &moved, &data), &expected);
        assert_trains(&family, &data, &root, &overrides);
    }
}

#[test]
fn caches_of_musubi_tuner_keep_their_bits_and_train() {
    let (_folder, root) = caches();
    let families = [
        ("flux2", FLUX2, vec![]),
        ("qwen_image", QWEN_IMAGE, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("wan", WAN, vec!["data.text_tokens=16"]),
        ("hunyuanvideo", HUNYUAN_VIDEO15, vec![]),
    ];
    for (name, family, overrides) in families {
        let (source, expected) =
            (root.join("musubi").join(name), root.join(format!("musubi/{name}.safetensors")));
        let data = root.join(format!("data-{name}"));
        let dataset = imported(CacheFormat::Musubi, &source, &data);
        assert_batch(&dataset.text_padding(TextPadding::Longest).unwrap(), &expected);
        assert_trains(&family, &data, &root, &overrides);
    }
}

#[test]
fn caches_of_ai_toolkit_keep_their_bits_and_train() {
    let (_folder, root) = caches();
    let families = [
        ("flux", FLUX, vec![]),
        ("qwen_image", QWEN_IMAGE, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("wan", WAN, vec![]),
    ];
    for (name, family, overrides) in families {
        let (source, expected) = (
            root.join("ai-toolkit").join(name),
            root.join(format!("ai-toolkit/{name}.safetensors")),
        );
        let data = root.join(format!("data-{name}"));
        assert_batch(&imported(CacheFormat::AiToolkit, &source, &data), &expected);
        assert_trains(&family, &data, &root, &overrides);
    }
}
