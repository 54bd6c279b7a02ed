//! Caches of other trainers that lie are refused before anything is written, in one line.

use std::fs;
use std::path::Path;

use fm_dist::datasets::caches::{CacheFormat, ImportRequest, import};
use serde_json::json;
use tempfile::TempDir;

use super::archive::{Described, pickle, saved, text};
use super::hostile::refusal;

/// A cached sample under NeMo's keys, of one latent and one token.
fn sample() -> Vec<u8> {
    let tensor = |shape: &'static [u32], strides: &'static [u32]| {
        let described =
            Described { class: "FloatStorage", key: "0", elements: 1, offset: 0, shape, strides };
        described.opcodes()
    };
    let entries = [
        text("latent"),
        tensor(&[1, 1, 1], &[1, 1, 1]),
        text("prompt_embeds"),
        tensor(&[1, 1, 1], &[1, 1, 1]),
        text("prompt"),
        text("a cat"),
    ];
    saved(&pickle(&[b"}(", &entries.concat()[..], b"u"].concat()), &[("0", &[0; 4])])
}

fn imported(folder: &Path, out: &Path) -> Result<usize, fm_dist::error::Error> {
    let request = ImportRequest {
        from: CacheFormat::Nemo,
        sources: vec![folder.into()],
        out: out.into(),
        captions: None,
        shard_bytes: 1 << 20,
        jobs: 1,
        name: None,
        source: None,
        licence: None,
    };
    import(&request).map(|written| written.samples)
}

/// A cache that lists this file.
fn cache(listed: &str) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("cache");
    fs::create_dir_all(folder.join("8x8")).unwrap();
    fs::write(folder.join("8x8/a.pt"), sample()).unwrap();
    fs::write(root.path().join("outside.pt"), sample()).unwrap();
    fs::write(folder.join("metadata.json"), json!({"shards": ["rows.json"]}).to_string()).unwrap();
    fs::write(folder.join("rows.json"), json!([{"cache_file": listed}]).to_string()).unwrap();
    root
}

#[test]
fn a_cache_lists_files_below_its_folder_only() {
    let root = cache("/gone/8x8/a.pt");
    let (folder, out) = (root.path().join("cache"), root.path().join("out"));
    assert_eq!(imported(&folder, &out).unwrap(), 1, "a cache that was moved");
    for listed in ["../outside.pt", "/etc/passwd", "", ".."] {
        let root = cache(listed);
        let (folder, out) = (root.path().join("cache"), root.path().join("out"));
        let text = refusal(|| imported(&folder, &out));
        assert!(text.ends_with("which is not below it") && !out.exists(), "{text}");
    }
}

#[test]
fn caches_that_are_not_what_they_seem_are_refused_before_anything_is_written() {
    let root = cache("a.pt");
    let (folder, out) = (root.path().join("cache"), root.path().join("out"));
    let refused = |what: &str| {
        let text = refusal(|| imported(&folder, &out));
        assert!(text.contains(what) && !out.exists(), "{what}: {text}");
    };
    fs::write(folder.join("8x8/a.pt"), saved(&pickle(b"cposix\nsystem\n)R"), &[])).unwrap();
    refused("names `posix.system`");
    fs::write(folder.join("8x8/a.pt"), saved(&pickle(b"}"), &[])).unwrap();
    refused("a.pt: holds no latents with their text");
    fs::write(folder.join("rows.json"), "[{}]").unwrap();
    refused("rows.json: missing field `cache_file`");
    fs::write(folder.join("metadata.json"), "<html>").unwrap();
    refused("metadata.json: is a web page (HTML)");
}
