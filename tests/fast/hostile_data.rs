//! Data that lie where their headers do not, files that are none, and datasets that are not what
//! they list: each is refused within a second, in one line that says why.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

use fm_dist::data::dataset::Dataset;
use fm_dist::data::{Links, OnBad};
use fm_dist::datasets::caches::CacheFormat;
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::settings::Choice;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;
use tempfile::TempDir;

use super::hostile::{SOUND, file, refusal, refused_bytes, tensor, with_header};

// What the data are once the header is believed.

#[test]
fn b4_a_file_cut_while_in_use_is_an_error() {
    let (_folder, path) = file(&with_header(SOUND.as_bytes(), 4));
    let opened = SafeTensors::open(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(20).unwrap();
    let text = refusal(|| opened.read("a"));
    assert!(
        text.ends_with("was 65 bytes long when it was opened and has been cut since"),
        "{text}"
    );
}

#[test]
fn a_sparse_file_larger_than_memory_is_an_error() {
    let bytes = 1u64 << 43;
    let header = tensor("U8", &format!("[{bytes}]"), &format!("[0,{bytes}]"));
    let (_folder, path) = file(&with_header(header.as_bytes(), 0));
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8 + header.len() as u64 + bytes)
        .unwrap();
    let opened = SafeTensors::open(&path).unwrap();
    assert!(
        refusal(|| opened.read("a")).contains("cannot hold 8796093022208 bytes of it in memory")
    );
}

#[test]
fn a_boolean_that_is_neither_true_nor_false_is_refused() {
    let mut contents = with_header(tensor("BOOL", "[4]", "[0,4]").as_bytes(), 4);
    *contents.last_mut().unwrap() = 7;
    let (_folder, path) = file(&contents);
    assert!(
        refusal(|| SafeTensors::open(&path).unwrap().read("a"))
            .ends_with("tensor `a` is BOOL and holds bytes other than 0 and 1")
    );
}

// What is not a file of data at all.

#[test]
fn what_a_download_leaves_in_place_of_a_file_is_called_what_it_is() {
    for (contents, what) in [
        (
            &b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"[..],
            "is a Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html><head><title>Log in</title>", "is a web page (HTML)"),
        (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "is an XML text"),
        (b"Entry not found", "is a text that begins \"Entry not found\""),
        (b"{\"error\": \"gated\"}", "is JSON, not a safetensors file"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0", "is a gzip archive; unpack it first"),
        (b"GGUF\x03\0\0\0\0\0", "is a GGUF file"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "is a NumPy array"),
        (b"\x80\x04N.", "is a pickle, which can run code"),
    ] {
        refused_bytes(contents, what);
        let folder = dataset(&[("a.safetensors", contents)], &[entry("a.safetensors", 4)]);
        refused_dataset(folder.path(), &format!("a.safetensors: {what}"));
        let folder = dataset(&[], &[]);
        fs::write(folder.path().join("dataset.json"), contents).unwrap();
        let what = if contents.starts_with(b"{") { "unknown field `error`" } else { what };
        refused_dataset(folder.path(), &format!("dataset.json: {what}"));
    }
}

#[test]
fn a_manifest_in_another_encoding_is_told() {
    let utf_16: Vec<u8> = "{\"format\"".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (contents, what) in [
        (
            b"\xef\xbb\xbf{\"format\": 1}".to_vec(),
            "begins with a byte order mark; save it as UTF-8 without one",
        ),
        ([b"\xff\xfe", utf_16.as_slice()].concat(), "is UTF-16; save it as UTF-8"),
        (utf_16.clone(), "is UTF-16; save it as UTF-8"),
        (Vec::new(), "is empty; expected JSON"),
    ] {
        let folder = dataset(&[], &[]);
        fs::write(folder.path().join("dataset.json"), contents).unwrap();
        refused_dataset(folder.path(), &format!("dataset.json: {what}"));
    }
}

#[test]
fn d14_a_pickle_is_refused_with_the_way_to_convert_it() {
    for name in ["model.pt", "model.bin", "model.ckpt", "MODEL.PTH"] {
        let text = refusal(|| SafeTensors::open(name));
        assert!(
            text.contains("is a pickle, which can run code")
                && text.contains("safetensors.torch.save_file("),
            "{text}"
        );
        let data = refusal(|| Dataset::open(name));
        assert!(
            data.contains("is a pickle, which can run code")
                && data.contains("`fm-dist data import --from nemo SRC --out DIR`")
                && !data.contains("python"),
            "{data}"
        );
    }
}

#[test]
fn a_missing_file_is_told() {
    assert_eq!(
        refusal(|| SafeTensors::open("nowhere.safetensors")),
        "nowhere.safetensors: does not exist"
    );
    assert_eq!(refusal(|| Dataset::open("nowhere")), "nowhere: does not exist");
}

#[test]
fn a_folder_in_place_of_a_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(refusal(|| SafeTensors::open(folder.path())).ends_with("is a folder, not a file"));
}

#[test]
fn a_device_is_refused_unopened() {
    assert_eq!(refusal(|| SafeTensors::open("/dev/zero")), "/dev/zero: is not a regular file");
}

#[test]
fn b5_a_fifo_is_refused_without_waiting_for_a_writer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo.safetensors");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    assert!(refusal(|| SafeTensors::open(&path)).ends_with("is not a regular file"));
}

// Datasets.

/// Four f32 images of 1x2x2, all zero but for `poison` in the place of one number.
fn images(poison: Option<(usize, f32)>) -> Vec<u8> {
    let mut contents = with_header(
        br#"{"image_latents":{"dtype":"F32","shape":[4,1,2,2],"data_offsets":[0,64]}}"#,
        64,
    );
    if let Some((place, value)) = poison {
        let start = contents.len() - 64 + 4 * place;
        contents[start..start + 4].copy_from_slice(&value.to_le_bytes());
    }
    contents
}

fn entry(path: &str, samples: u64) -> serde_json::Value {
    json!({"path": path, "samples": samples, "group": "2x2", "sha256": "0".repeat(64)})
}

/// A folder with these files and a `dataset.json` that lists `entries`.
fn dataset(files: &[(&str, &[u8])], entries: &[serde_json::Value]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        fs::write(folder.path().join(name), contents).unwrap();
    }
    let manifest = json!({
        "format": "fm-dist dataset", "version": 1, "name": "hostile", "source": "a test", "licence": "CC0", "data_type": "image", "files": entries,
    });
    fs::write(folder.path().join("dataset.json"), manifest.to_string()).unwrap();
    folder
}

#[track_caller]
fn refused_dataset(folder: &Path, reason: &str) {
    let text = refusal(|| Dataset::open(folder));
    assert!(text.contains(reason), "expected `{reason}` in `{text}`");
}

/// The same folder in version 2 of the format.
fn in_version_2(folder: TempDir) -> TempDir {
    let path = folder.path().join("dataset.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"version\":1", "\"version\":2")).unwrap();
    folder
}

/// Four images with texts of these lengths, in a tensor of `tokens` rows.
fn texts(lengths: &[i64], tokens: usize, further: &str) -> Vec<u8> {
    let (begin, end) = (64 + 4 * tokens, 64 + 4 * tokens + 8 * lengths.len());
    let header = format!(
        r#"{{"image_latents":{{"dtype":"F32","shape":[4,1,2,2],"data_offsets":[0,64]}},
        "text_embeddings":{{"dtype":"F32","shape":[{tokens},1],"data_offsets":[64,{begin}]}},
        "text_embeddings.lengths":{{"dtype":"I64","shape":[{}],"data_offsets":[{begin},{end}]}}{further}}}"#,
        lengths.len()
    );
    let mut contents = with_header(header.as_bytes(), begin);
    contents.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
    contents
}

#[test]
fn lengths_that_do_not_fit_their_texts_are_refused() {
    let refused = |contents: &[u8], reason: &str| {
        let folder = dataset(&[("a.safetensors", contents)], &[entry("a.safetensors", 4)]);
        refused_dataset(in_version_2(folder).path(), reason);
    };
    refused(
        &texts(&[1, 2, 3, 4], 9, ""),
        "`text_embeddings` has 9 rows, but its lengths sum up to 10",
    );
    refused(
        &texts(&[0, 0, 0, 0], 2, ""),
        "`text_embeddings` has 2 rows, but its lengths sum up to 0",
    );
    refused(&texts(&[1, 2, 3, -1], 5, ""), "has a sample of -1 tokens");
    refused(&texts(&[i64::MAX, 2, 3, 1], 5, ""), "has a sample of 2 tokens");
    refused(&texts(&[1, 2, 3], 6, ""), "`text_embeddings.lengths` has shape [3]");
    let floats = texts(&[1, 2, 3, 4], 10, "");
    let at = floats.windows(3).position(|three| three == b"I64").unwrap();
    let floats = [&floats[..at], b"F64", &floats[at + 3..]].concat();
    refused(&floats, "has lengths Double [4]; expected Int64 [4]");
    let sound = texts(&[1, 2, 3, 4], 10, "");
    let folder = || dataset(&[("a.safetensors", &sound)], &[entry("a.safetensors", 4)]);
    assert_eq!(Dataset::open(in_version_2(folder()).path()).unwrap().num_samples(), 4);
    refused_dataset(folder().path(), "has shape [10, 1], but dataset.json says 4 samples");
}

#[test]
fn lengths_of_what_is_no_text_or_beside_a_mask_are_refused() {
    for (key, reason) in [
        ("image_latents.lengths", "gives lengths to what is no text"),
        ("labels.lengths", "gives lengths to what is no text"),
        ("text_embeddings.lengths", "holds no tensor `text_embeddings`"),
    ] {
        let header = format!(
            r#"{{"image_latents":{{"dtype":"F32","shape":[4,1,2,2],"data_offsets":[0,64]}},
            "{key}":{{"dtype":"I64","shape":[4],"data_offsets":[64,96]}}}}"#
        );
        let contents = with_header(header.as_bytes(), 96);
        let folder = dataset(&[("a.safetensors", &contents)], &[entry("a.safetensors", 4)]);
        refused_dataset(in_version_2(folder).path(), reason);
    }
    let header = r#"{"image_latents":{"dtype":"F32","shape":[4,1,2,2],"data_offsets":[0,64]},
        "text_mask":{"dtype":"U8","shape":[4,1],"data_offsets":[64,68]},
        "text_embeddings":{"dtype":"F32","shape":[4,1],"data_offsets":[68,84]},
        "text_embeddings.lengths":{"dtype":"I64","shape":[4],"data_offsets":[84,116]}}"#;
    let contents = with_header(header.as_bytes(), 116);
    let folder = dataset(&[("a.safetensors", &contents)], &[entry("a.safetensors", 4)]);
    refused_dataset(in_version_2(folder).path(), "stands beside a mask");
}

#[test]
fn a_file_of_a_single_sample_has_no_axis_of_samples() {
    let header = br#"{"image_latents":{"dtype":"F32","shape":[1,2,2],"data_offsets":[0,16]}}"#;
    let contents = with_header(header, 16);
    let single = |samples: u64| {
        let mut entry = entry("a.safetensors", samples);
        entry["single"] = true.into();
        dataset(&[("a.safetensors", &contents)], &[entry])
    };
    let opened = Dataset::open(in_version_2(single(1)).path()).unwrap();
    assert_eq!(opened.batch(&[0, 0]).unwrap().tensors["image_latents"].size(), [2, 1, 2, 2]);
    refused_dataset(single(1).path(), "`a.safetensors` is single and has samples = 1 in version 1");
    refused_dataset(in_version_2(single(2)).path(), "is single and has samples = 2 in version 2");
    let mut unequal = entry("a.safetensors", 1);
    unequal["unequal"] = true.into();
    let folder = in_version_2(dataset(&[("a.safetensors", &contents)], &[unequal]));
    refused_dataset(folder.path(), "`a.safetensors` is unequal; only a single sample can be");
    let plain = dataset(&[("a.safetensors", &contents)], &[entry("a.safetensors", 1)]);
    refused_dataset(plain.path(), "expected floats [C, H, W]");
}

#[test]
fn captions_are_a_file_of_the_folder_in_version_2() {
    let captioned = |version: u64, path: &str| {
        let folder = dataset(&[("a.safetensors", &images(None))], &[entry("a.safetensors", 4)]);
        let manifest = folder.path().join("dataset.json");
        let mut json: serde_json::Value =
            serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
        json["version"] = version.into();
        json["captions"] = json!({"path": path, "sha256": "0".repeat(64)});
        fs::write(manifest, json.to_string()).unwrap();
        folder
    };
    refused_dataset(captioned(1, "c.jsonl").path(), "has captions, which version 2 of the format");
    refused_dataset(captioned(2, "c.jsonl").path(), "c.jsonl: does not exist");
    refused_dataset(captioned(2, "../c.jsonl").path(), "leaves the data folder");
    refused_dataset(captioned(2, ".").path(), "names no file");
    let folder = captioned(2, "c.jsonl");
    mknodat(CWD, folder.path().join("c.jsonl"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    refused_dataset(folder.path(), "c.jsonl: is not a regular file");
}

#[test]
fn the_dataset_that_the_lies_are_made_from_is_sound() {
    let folder = dataset(&[("a.safetensors", &images(None))], &[entry("a.safetensors", 4)]);
    assert_eq!(
        Dataset::open(folder.path()).unwrap().batch(&[3, 1]).unwrap().tensors["image_latents"]
            .size(),
        [2, 1, 2, 2]
    );
}

#[test]
fn b5_a_path_out_of_the_data_folder_is_refused() {
    for path in ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors"] {
        refused_dataset(
            dataset(&[], &[entry(path, 4)]).path(),
            &format!("path `{path}` leaves the data folder"),
        );
    }
}

#[test]
fn a_path_that_stays_in_its_place_is_no_way_out_of_the_data_folder() {
    for path in ["./a.safetensors", ".//a.safetensors", "././a.safetensors", "b/.././a.safetensors"]
    {
        let folder = dataset(&[("a.safetensors", &images(None))], &[entry(path, 4)]);
        match path.contains("..") {
            true => refused_dataset(folder.path(), "leaves the data folder"),
            false => assert_eq!(Dataset::open(folder.path()).unwrap().num_samples(), 4, "{path}"),
        }
    }
    for path in [".", "./", ""] {
        refused_dataset(
            dataset(&[], &[entry(path, 4)]).path(),
            &format!("path `{path}` names no file"),
        );
    }
}

#[test]
fn b5_a_link_out_of_the_data_folder_is_refused() {
    let (_outside, target) = file(&images(None));
    let folder = dataset(&[], &[entry("a.safetensors", 4)]);
    symlink(target, folder.path().join("a.safetensors")).unwrap();
    let what = "path leaves the data folder: it is a link to";
    refused_dataset(folder.path(), what);
    refused_dataset(folder.path(), "; data.follow_links = true, or --follow-links of fm-dist data");
    let followed = Dataset::open_with(folder.path(), Links::Followed).unwrap();
    assert_eq!(followed.batch(&[3]).unwrap().tensors["image_latents"].size(), [1, 1, 2, 2]);
    let error = refusal(|| followed.verify_hashes());
    assert!(
        error.contains("/a.safetensors: has sha256 "),
        "hashes are checked all the same: {error}"
    );
    for outside in ["../outside.safetensors", "/etc/passwd"] {
        let folder = dataset(&[], &[entry(outside, 4)]);
        let text = refusal(|| Dataset::open_with(folder.path(), Links::Followed));
        assert!(text.contains("leaves the data folder"), "only links lead out: {text}");
    }
}

#[test]
fn a_link_that_leads_to_itself_is_refused_whether_links_are_followed_or_not() {
    let folder = dataset(&[], &[entry("a.safetensors", 4)]);
    symlink("b.safetensors", folder.path().join("a.safetensors")).unwrap();
    symlink("a.safetensors", folder.path().join("b.safetensors")).unwrap();
    for links in [Links::Inside, Links::Followed] {
        let text = refusal(|| Dataset::open_with(folder.path(), links));
        assert!(text.ends_with("a.safetensors: is a link that leads to itself"), "{text}");
    }
}

#[test]
fn a_followed_link_is_no_way_to_open_a_device_or_a_pickle() {
    for (target, name, what) in [
        ("/dev/zero", "a.safetensors", "is not a regular file"),
        ("/no/such/file", "a.safetensors", "does not exist"),
        ("/dev/zero", "a.pt", "is a pickle"),
    ] {
        let folder = dataset(&[], &[entry(name, 4)]);
        symlink(target, folder.path().join(name)).unwrap();
        let text = refusal(|| Dataset::open_with(folder.path(), Links::Followed));
        assert!(text.contains(what), "{text}");
    }
}

#[test]
fn a_link_inside_of_the_data_folder_is_followed() {
    let folder = dataset(&[("real.safetensors", &images(None))], &[entry("a.safetensors", 4)]);
    symlink("real.safetensors", folder.path().join("a.safetensors")).unwrap();
    assert_eq!(Dataset::open(folder.path()).unwrap().num_samples(), 4);
}

#[test]
fn b6_data_without_samples_are_refused() {
    refused_dataset(dataset(&[], &[]).path(), "files");
    refused_dataset(
        dataset(&[("a.safetensors", &images(None))], &[entry("a.safetensors", 0)]).path(),
        "samples",
    );
}

#[test]
fn a_folder_without_a_manifest_is_refused() {
    refused_dataset(tempfile::tempdir().unwrap().path(), "dataset.json: does not exist");
}

#[test]
fn a_folder_that_is_no_dataset_yet_says_how_to_make_one_of_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.safetensors"), images(None)).unwrap();
    let shown = folder.path().display();
    refused_dataset(folder.path(), "does not exist; the folder holds safetensors files");
    refused_dataset(folder.path(), &format!("`fm-dist data index {shown}`"));
    let marks = [
        ("nemo", "metadata.json"),
        ("musubi", "cat_wan_te.safetensors"),
        ("ai-toolkit", "_latent_cache/a.safetensors"),
        ("diffusion-pipe", "cache/wan/cache_1x8x8x1/latents/metadata.db"),
        ("simpletuner", "aspect_ratio_bucket_indices_x.json"),
    ];
    for (from, file) in marks {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "{\"shards\": []}").unwrap();
        let shown = folder.path().display();
        refused_dataset(
            folder.path(),
            &format!("`fm-dist data import --from {from} {shown} --out DIR`"),
        );
    }
    for (word, _) in CacheFormat::ALL {
        assert!(marks.iter().any(|(from, _)| from == word), "no folder says --from {word}");
    }
}

#[test]
fn a_manifest_that_is_not_text_is_refused() {
    let folder = dataset(&[], &[]);
    fs::write(folder.path().join("dataset.json"), b"{\"format\":\"\xff\"}").unwrap();
    refused_dataset(folder.path(), "invalid unicode code point");
}

#[test]
fn a_pickle_in_the_list_of_files_is_refused() {
    refused_dataset(dataset(&[("a.pt", b"")], &[entry("a.pt", 4)]).path(), "is a pickle");
}

#[test]
fn a_count_that_the_file_does_not_hold_is_refused() {
    let folder = dataset(&[("a.safetensors", &images(None))], &[entry("a.safetensors", 5)]);
    refused_dataset(
        folder.path(),
        "`image_latents` has shape [4, 1, 2, 2], but dataset.json says 5 samples",
    );
}

#[test]
fn data_without_their_latents_are_refused() {
    let folder = dataset(
        &[("a.safetensors", &with_header(SOUND.as_bytes(), 4))],
        &[entry("a.safetensors", 4)],
    );
    refused_dataset(folder.path(), "holds no `image_latents`, which image data need; it has a");
}

#[test]
fn latents_of_another_number_of_axes_are_refused() {
    let contents = with_header(
        br#"{"image_latents":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}"#,
        64,
    );
    refused_dataset(
        dataset(&[("a.safetensors", &contents)], &[entry("a.safetensors", 4)]).path(),
        "is Float [4] a sample; expected floats [C, H, W]",
    );
}

#[test]
fn b10_files_of_one_group_that_differ_are_both_named() {
    let other = with_header(
        br#"{"image_latents":{"dtype":"F16","shape":[4,1,2,2],"data_offsets":[0,32]}}"#,
        32,
    );
    let folder = dataset(
        &[("a.safetensors", &images(None)), ("b.safetensors", &other)],
        &[entry("a.safetensors", 4), entry("b.safetensors", 4)],
    );
    let text = refusal(|| Dataset::open(folder.path()));
    assert!(
        text.contains(
            "b.safetensors: `image_latents` is Half [1, 2, 2] a sample, but Float [1, 2, 2] in "
        ),
        "{text}"
    );
    assert!(text.ends_with("a.safetensors of the same group `2x2`"), "{text}");
}

#[test]
fn numbers_that_are_not_finite_are_told_with_sample_count_and_place() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let files: [(&str, &[u8]); 2] =
            [("a.safetensors", &images(None)), ("b.safetensors", &images(Some((9, poison))))];
        let folder = dataset(&files, &[entry("a.safetensors", 4), entry("b.safetensors", 4)]);
        let dataset = Dataset::open(folder.path()).unwrap();
        let text = refusal(|| dataset.batch(&[1, 5, 6]));
        assert!(
            text.ends_with("b.safetensors: `image_latents` of sample 6 (row 2) has 1 numbers that are not finite, the first at [0, 0, 1]"),
            "{text}"
        );
    }
}

#[test]
fn b1_a_sample_that_is_not_finite_is_replaced_by_its_next_neighbour_where_that_is_asked_for() {
    let files: [(&str, &[u8]); 2] =
        [("a.safetensors", &images(None)), ("b.safetensors", &images(Some((9, f32::NAN))))];
    let folder = dataset(&files, &[entry("a.safetensors", 4), entry("b.safetensors", 4)]);
    let dataset = Dataset::open(folder.path()).unwrap().on_bad(OnBad::Skip);
    let (batch, neighbours) =
        (dataset.batch(&[1, 6, 5]).unwrap(), dataset.batch(&[1, 7, 5]).unwrap());
    assert!(batch.get("image_latents").unwrap().equal(neighbours.get("image_latents").unwrap()));
    assert_eq!(
        (batch.sample_ids, batch.bad_samples, neighbours.bad_samples),
        (vec![1, 6, 5], 1, 0)
    );
}

#[test]
fn a_file_changed_after_its_hash_was_taken_is_found() {
    let folder = dataset(&[("a.safetensors", &images(None))], &[entry("a.safetensors", 4)]);
    let dataset = Dataset::open(folder.path()).unwrap();
    let text = refusal(|| dataset.verify_hashes());
    assert!(
        text.contains("has sha256 ")
            && text.ends_with(&format!("dataset.json says {}", "0".repeat(64))),
        "{text}"
    );
}
