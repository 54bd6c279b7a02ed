//! One test for each lie that a data file can tell: it is refused within a second, in one line that
//! says why.
//!
//! Long because each lie has a test of its own, so that a failure names the lie.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fm_dist::data::OnBad;
use fm_dist::data::dataset::Dataset;
use fm_dist::error::Error;
use fm_dist::files::safetensors::SafeTensors;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;
use tempfile::TempDir;

use crate::clock::processor_time;

/// A hostile file may cost no more of a processor than this. The worst take 0.4 s in a debug build.
const PATIENCE: Duration = Duration::from_secs(1);
const SOUND: &str = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;

/// The one line with which `attempt` is refused as bad data.
#[track_caller]
pub fn refusal<T>(attempt: impl FnOnce() -> Result<T, Error>) -> String {
    let before = processor_time();
    let Err(error) = attempt() else { panic!("a hostile file was taken") };
    let took = processor_time() - before;
    assert!(took < PATIENCE, "took {took:?}");
    assert_eq!(error.name(), "DATA", "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n') && text.len() < 600, "{text}");
    text
}

fn file(contents: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.safetensors");
    fs::write(&path, contents).unwrap();
    (folder, path)
}

fn with_header(header: &[u8], data_bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, &vec![0; data_bytes]].concat()
}

#[track_caller]
fn refused_bytes(contents: &[u8], reason: &str) {
    let (_folder, path) = file(contents);
    let text = refusal(|| SafeTensors::open(&path));
    assert!(text.contains(reason), "expected `{reason}` in `{text}`");
}

/// A header over four bytes of data is refused for this reason.
#[track_caller]
fn refused(header: &str, reason: &str) {
    refused_bytes(&with_header(header.as_bytes(), 4), reason);
}

/// One tensor `a` over four bytes of data.
fn tensor(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

#[test]
fn the_file_that_the_lies_are_made_from_is_sound() {
    let (_folder, path) = file(&with_header(SOUND.as_bytes(), 4));
    assert_eq!(SafeTensors::open(&path).unwrap().tensors()[0].shape, [4]);
}

// Length of the file and of the header.

#[test]
fn an_empty_file_is_refused() {
    refused_bytes(b"", "is 0 bytes long, too short for a safetensors file");
}

#[test]
fn a_file_cut_in_the_length_field_is_refused() {
    refused_bytes(&[1; 7], "is 7 bytes long, too short");
}

#[test]
fn a_file_cut_behind_the_length_field_is_refused() {
    refused_bytes(&with_header(SOUND.as_bytes(), 4)[..8], "does not fit the file's 8 bytes");
}

#[test]
fn b2_a_file_cut_in_the_header_is_refused() {
    refused_bytes(&with_header(SOUND.as_bytes(), 4)[..30], "does not fit the file's 30 bytes");
}

#[test]
fn b2_a_file_cut_in_the_data_is_refused() {
    refused(&tensor("U8", "[5]", "[0,5]"), "tensors end at byte 5 of the data, the file at 4");
}

#[test]
fn bytes_behind_the_last_tensor_are_refused() {
    refused(&tensor("U8", "[3]", "[0,3]"), "tensors end at byte 3 of the data, the file at 4");
}

#[test]
fn b3_a_header_as_long_as_the_number_range_is_refused() {
    refused_bytes(
        &[0xff; 100],
        "header of 18446744073709551615 bytes is longer than the 16777216 allowed",
    );
}

#[test]
fn a_header_larger_than_any_real_one_is_refused_unread() {
    let (_folder, path) = file(&(99u64 << 20).to_le_bytes());
    File::options().write(true).open(&path).unwrap().set_len(200 << 20).unwrap();
    assert!(
        refusal(|| SafeTensors::open(&path))
            .contains("header of 103809024 bytes is longer than the 16777216 allowed")
    );
}

#[test]
fn a_header_of_no_bytes_is_refused() {
    refused("", "header does not begin with `{`");
}

// The header as JSON.

#[test]
fn a_header_that_is_not_utf_8_is_refused() {
    refused_bytes(&with_header(b"{\"a\xff\":1}", 0), "header is not UTF-8 from byte 3 on");
}

#[test]
fn a_header_that_is_not_an_object_is_refused() {
    refused("[1,2]", "header does not begin with `{`");
}

#[test]
fn a_header_that_is_cut_off_is_refused() {
    refused(&SOUND[..20], "header is malformed: tensor `a`: EOF while parsing");
}

#[test]
fn text_behind_the_header_is_refused() {
    refused(&format!("{SOUND}{SOUND}"), "header is malformed: trailing characters");
}

#[test]
fn deep_nesting_is_refused() {
    let deep = "[".repeat(1 << 20);
    refused(&format!(r#"{{"a":{deep}"#), "header is malformed");
    refused(&tensor("U8", &deep, "[0,4]"), "header is malformed");
}

#[test]
fn an_unknown_field_is_refused() {
    refused(
        r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"strides":[1]}}"#,
        "unknown field `strides`, expected one of `dtype`, `shape`, `data_offsets`",
    );
}

#[test]
fn a_missing_field_is_refused() {
    refused(r#"{"a":{"dtype":"U8","shape":[4]}}"#, "missing field `data_offsets`");
}

#[test]
fn a_field_given_twice_is_refused() {
    refused(
        r#"{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}"#,
        "duplicate field `dtype`",
    );
}

#[test]
fn a_tensor_given_twice_is_refused() {
    let entry = &SOUND[1..SOUND.len() - 1];
    refused(&format!("{{{entry},{entry}}}"), "duplicate tensor `a`");
}

#[test]
fn a_name_given_twice_in_other_letters_of_json_is_refused() {
    let entry = &SOUND[1..SOUND.len() - 1];
    refused(
        &format!("{{{entry},{}}}", entry.replace(r#""a""#, r#""\u0061""#)),
        "duplicate tensor `a`",
    );
}

#[test]
fn metadata_given_twice_are_refused() {
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, "duplicate `__metadata__`");
    refused(r#"{"__metadata__":{"k":"v","k":"w"}}"#, "duplicate metadata key `k`");
}

#[test]
fn metadata_that_are_not_texts_are_refused() {
    refused(r#"{"__metadata__":{"k":1}}"#, "invalid type: integer `1`, expected a string");
    refused(r#"{"__metadata__":null}"#, "invalid type: null, expected an object of texts");
}

#[test]
fn more_tensors_than_any_model_has_are_refused() {
    let entries: Vec<String> = (0..150_000)
        .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1))
        .collect();
    refused(&format!("{{{}}}", entries.join(",")), "more than 65536 entries");
}

#[test]
fn more_metadata_than_anyone_writes_are_refused() {
    let entries: Vec<String> = (0..1_000_000).map(|i| format!(r#""{i}":"""#)).collect();
    refused(&format!(r#"{{"__metadata__":{{{}}}}}"#, entries.join(",")), "more than 65536 entries");
}

#[test]
fn b3_sixteen_megabytes_of_axes_are_refused() {
    let axes = "1,".repeat((16 << 20) / 2 - 100);
    refused(&tensor("U8", &format!("[{axes}1]"), "[0,4]"), "a shape has more than 8 axes");
}

// Names.

#[test]
fn a_tensor_without_a_name_is_refused() {
    refused(&SOUND.replace(r#""a""#, r#""""#), "illegal tensor name ``");
}

#[test]
fn a_name_that_is_a_path_is_refused() {
    for name in ["../../etc/x", "/etc/x", "a/b", "..", ".a", "a..b"] {
        refused(
            &SOUND.replace(r#""a""#, &format!("\"{name}\"")),
            &format!("illegal tensor name `{name}`"),
        );
    }
}

#[test]
fn f5_a_name_with_control_characters_is_refused_on_one_line() {
    refused(
        &SOUND.replace(r#""a""#, r#""a\n\u001b[31mb""#),
        r"illegal tensor name `a\n\u{1b}[31mb`",
    );
}

#[test]
fn a_name_that_is_too_long_is_refused_and_shortened() {
    refused(
        &SOUND.replace(r#""a""#, &format!("\"{}\"", "n".repeat(129))),
        "illegal tensor name `nnn",
    );
    refused(
        &SOUND.replace(r#""a""#, &format!("\"{}\"", "n".repeat(1 << 20))),
        "illegal tensor name `nnn",
    );
}

// Kinds, shapes and places.

#[test]
fn an_unknown_dtype_is_refused() {
    refused(
        &tensor("F8_E4M3", "[4]", "[0,4]"),
        "tensor `a` has dtype `F8_E4M3`; expected one of BOOL U8 I8",
    );
}

#[test]
fn an_axis_of_nothing_is_refused() {
    refused(
        &tensor("U8", "[4,0]", "[0,0]"),
        "tensor `a` [4, 0] has an axis of 0, expected at least 1",
    );
}

#[test]
fn an_axis_that_is_no_count_is_refused() {
    refused(
        &tensor("U8", "[-4]", "[0,4]"),
        "tensor `a` [-4] has an axis of -4, expected at least 1",
    );
    refused(&tensor("U8", "[4.0]", "[0,4]"), "invalid type: floating point `4.0`");
    refused(
        &tensor("U8", "[18446744073709551615]", "[0,4]"),
        "invalid value: integer `18446744073709551615`",
    );
}

#[test]
fn nine_axes_are_refused() {
    refused(&tensor("U8", "[1,1,1,1,1,1,1,1,4]", "[0,4]"), "a shape has more than 8 axes");
}

#[test]
fn b3_a_shape_whose_product_overflows_is_refused() {
    refused(
        &tensor("F64", "[4294967296,4294967296]", "[0,0]"),
        "tensor `a` of shape [4294967296, 4294967296] is larger than any file",
    );
}

#[test]
fn a_shape_that_overflows_only_in_bytes_is_refused() {
    refused(&tensor("F64", "[2305843009213693952]", "[0,0]"), "is larger than any file");
}

#[test]
fn b3_sizes_whose_sum_overflows_are_refused() {
    let half = 1u64 << 62;
    let entry = |name: &str, begin: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"U8","shape":[{half}],"data_offsets":[{begin},{end}]}}"#)
    };
    let entries = [
        entry("a", 0, half),
        entry("b", half, 2 * half),
        entry("c", 2 * half, 3 * half),
        entry("d", 3 * half, 0),
    ];
    refused(
        &format!("{{{}}}", entries.join(",")),
        "tensor `d` U8 [4611686018427387904] takes 4611686018427387904 bytes",
    );
}

#[test]
fn offsets_that_do_not_fit_the_shape_are_refused() {
    refused(
        &tensor("I16", "[4]", "[0,4]"),
        "tensor `a` I16 [4] takes 8 bytes, its offsets say 0 to 4",
    );
}

#[test]
fn offsets_that_run_backwards_are_refused() {
    refused(&tensor("U8", "[4]", "[4,0]"), "takes 4 bytes, its offsets say 4 to 0");
}

#[test]
fn offsets_that_are_no_counts_are_refused() {
    refused(&tensor("U8", "[4]", "[-4,0]"), "invalid value: integer `-4`, expected u64");
    refused(&tensor("U8", "[4]", "[0,4,8]"), "header is malformed");
    refused(&tensor("U8", "[4]", "[4]"), "invalid length 1");
}

#[test]
fn tensors_that_overlap_are_refused() {
    let header = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#;
    refused(
        header,
        "tensor `b` overlaps the tensor before it: begins at byte 2 of the data, expected 3",
    );
}

#[test]
fn a_hole_between_tensors_is_refused() {
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#;
    refused(header, "tensor `b` leaves a hole before it: begins at byte 2 of the data, expected 1");
}

#[test]
fn a_hole_before_the_first_tensor_is_refused() {
    refused(
        &tensor("U8", "[3]", "[1,4]"),
        "tensor `a` leaves a hole before it: begins at byte 1 of the data, expected 0",
    );
}

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
        assert_eq!(text, refusal(|| Dataset::open(name)));
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
    refused_dataset(folder.path(), "path leaves the data folder: it is a link to");
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
