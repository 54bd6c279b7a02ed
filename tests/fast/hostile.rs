//! One test for each lie that the header of a data file can tell, so that a failure names the lie:
//! it is refused within a second, in one line that says why.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use fm_dist::error::Error;
use fm_dist::files::safetensors::SafeTensors;
use tempfile::TempDir;

use crate::clock::processor_time;

/// A hostile file may cost no more of a processor than this. The worst take 0.4 s in a debug build.
const PATIENCE: Duration = Duration::from_secs(1);
pub const SOUND: &str = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;

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

pub fn file(contents: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.safetensors");
    fs::write(&path, contents).unwrap();
    (folder, path)
}

pub fn with_header(header: &[u8], data_bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, &vec![0; data_bytes]].concat()
}

#[track_caller]
pub fn refused_bytes(contents: &[u8], reason: &str) {
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
pub fn tensor(dtype: &str, shape: &str, offsets: &str) -> String {
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
        &tensor("F8_E8M0", "[4]", "[0,4]"),
        "tensor `a` has dtype `F8_E8M0`; expected one of BOOL U8 I8",
    );
}

#[test]
fn floats_of_8_bits_are_refused_outside_of_datasets() {
    for dtype in ["F8_E4M3", "F8_E5M2"] {
        let what = format!(
            "tensor `a` has dtype `{dtype}`, which only weights and the samples of a dataset may have; expected \
             one of BOOL U8 I8 I16"
        );
        refused(&tensor(dtype, "[4]", "[0,4]"), &what);
    }
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
