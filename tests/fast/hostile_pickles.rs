//! Files of `torch.save` are parsed and never run: what is no tensor, text, number or list of them
//! is refused within a second, in one line, and so is each lie about a storage.

use std::fs;

use fm_dist::files::pickle::{PickledFile, Region, Value};
use tch::Tensor;
use tempfile::TempDir;

use super::archive::{Described, SOUND, numbers, pickle, saved, text, zip};
use super::hostile::refusal;

fn file(bytes: &[u8]) -> (TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pt");
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

/// Six floats from 0 on.
fn storage() -> Vec<u8> {
    (0..6u8).flat_map(|number| f32::from(number).to_le_bytes()).collect()
}

fn opened(body: &[u8]) -> Result<PickledFile, fm_dist::error::Error> {
    let (_folder, path) = file(&saved(&pickle(body), &[("0", &storage())]));
    PickledFile::open(&path)
}

fn refused(body: &[u8], what: &str) {
    let text = refusal(|| opened(body));
    assert!(text.contains(what), "{what}: {text}");
}

fn refused_bytes(bytes: &[u8], what: &str) {
    let (_folder, path) = file(bytes);
    let text = refusal(|| PickledFile::open(&path));
    assert!(text.contains(what), "{what}: {text}");
}

/// Opcodes of a dictionary of these entries.
fn dictionary(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let entries: Vec<u8> =
        entries.iter().flat_map(|(key, value)| [&text(key), *value].concat()).collect();
    [b"}(", &entries[..], b"u"].concat()
}

#[test]
fn tensors_texts_and_numbers_are_read() {
    let turned = Described { offset: 1, shape: &[2, 2], strides: &[1, 3], ..SOUND };
    let body = dictionary(&[
        ("whole", &SOUND.opcodes()),
        ("turned", &turned.opcodes()),
        ("prompt", &text("a cat")),
        ("size", &numbers(&[8, 16])),
        ("ratio", b"G\x3f\xf8\0\0\0\0\0\0"),
        ("small", b"\x8a\x01\xff"),
        ("none", b"N"),
        ("yes", b"\x88"),
    ]);
    let (_folder, path) = file(&saved(&pickle(&body), &[("0", &storage())]));
    let opened = PickledFile::open(&path).unwrap();
    let root = opened.root();
    assert_eq!(root.get("prompt").and_then(Value::text), Some("a cat"));
    assert_eq!(root.get("size"), Some(&Value::List(vec![Value::Int(8), Value::Int(16)])));
    assert_eq!(root.get("ratio"), Some(&Value::Float(1.5)));
    assert_eq!((root.get("small"), root.get("none")), (Some(&Value::Int(-1)), Some(&Value::None)));
    let read = |key: &str| opened.read(root.get(key).unwrap().tensor().unwrap()).unwrap();
    assert!(
        read("whole").equal(&Tensor::from_slice(&[0f32, 1.0, 2.0, 3.0, 4.0, 5.0]).view([2, 3]))
    );
    assert!(read("turned").equal(&Tensor::from_slice(&[1f32, 4.0, 2.0, 5.0]).view([2, 2])));
}

#[test]
fn an_archive_inside_of_a_file_is_read_and_one_beyond_its_end_is_refused() {
    let inner = saved(&pickle(&SOUND.opcodes()), &[("0", &storage())]);
    let (_folder, path) = file(&[b"before", &inner[..], b"after"].concat());
    let region = Region { start: 6, bytes: inner.len() as u64 };
    let opened = PickledFile::open_region(&path, region).unwrap();
    let tensor = opened.read(opened.root().tensor().unwrap()).unwrap();
    assert_eq!(tensor.size(), [2, 3]);
    for region in [Region { bytes: 1 << 40, ..region }, Region { start: u64::MAX, ..region }] {
        let text = refusal(|| PickledFile::open_region(&path, region));
        assert!(text.contains("does not fit"), "{text}");
    }
}

// What could run.

#[test]
fn a_pickle_that_would_run_something_is_refused_and_not_run() {
    let folder = tempfile::tempdir().unwrap();
    let witness = folder.path().join("witness");
    let command = text(&format!("touch {}", witness.display()));
    for (module, name) in
        [("posix", "system"), ("os", "system"), ("builtins", "eval"), ("torch", "load")]
    {
        let call = format!("c{module}\n{name}\n(").into_bytes();
        let body = [&call[..], &command, b"tR"].concat();
        refused(&body, &format!("names `{module}.{name}`, which is neither a tensor"));
    }
    assert!(!witness.exists());
}

#[test]
fn opcodes_that_tensors_do_not_need_are_refused() {
    // INST, OBJ, BUILD, NEWOBJ, NEWOBJ_EX, EXT1, EXT2, EXT4, STACK_GLOBAL, PERSID, INT, LONG,
    // LONG4, STRING, BINSTRING, UNICODE, BINBYTES, BYTEARRAY8, NEXT_BUFFER, FLOAT, GET, PUT, DICT,
    // LIST, POP, POP_MARK, DUP, MEMOIZE, FRAME, EMPTY_SET, ADDITEMS, FROZENSET.
    for opcode in b"iob\x81\x92\x82\x83\x84\x93PIL\x8bSTVB\x96\x97Fgpdl01\x32\x94\x95\x8f\x90\x91" {
        refused(&[b"N", &[*opcode][..]].concat(), &format!("with opcode {opcode:#04x} at byte 3"));
    }
}

#[test]
fn functions_are_called_with_their_own_arguments_only() {
    refused(b"ctorch._utils\n_rebuild_tensor_v2\n)R", "calls RebuildTensor with 0 arguments");
    refused(b"ccollections\nOrderedDict\n]\x85R", "calls OrderedDict with 1 arguments");
    refused(b"N)R", "calls what is no function of torch");
    refused(b"ctorch\nFloatStorage\n)R", "calls Storage(Float) with 0 arguments");
    refused(b"ctorch._utils\n_rebuild_parameter\n(]NNtR", "calls RebuildParameter");
}

// Lies about storages.

#[test]
fn a_storage_of_another_size_than_its_entry_is_refused() {
    for elements in [5, 7, u32::MAX] {
        let lie = Described { elements, ..SOUND };
        refused(&lie.opcodes(), "but it has 24 bytes");
    }
    refused(&Described { class: "DoubleStorage", ..SOUND }.opcodes(), "6 elements of Double");
    refused(&Described { key: "../0", ..SOUND }.opcodes(), "refers to storage `../0`, which the");
    refused(
        &Described { class: "QUInt8Storage", ..SOUND }.opcodes(),
        "names `torch.QUInt8Storage`",
    );
}

#[test]
fn a_tensor_beyond_its_storage_is_refused() {
    let most = u32::MAX;
    for (offset, shape, strides) in [
        (1, &[2, 3][..], &[3, 1][..]),
        (0, &[2, 3], &[4, 1]),
        (0, &[2, 4], &[0, 1]),
        (0, &[most - 1, 3], &[3, 1]),
        (most, &[2, 3], &[3, 1]),
        (0, &[2, 3], &[most, 1]),
        (7, &[0], &[1]),
    ] {
        let lie = Described { offset, shape, strides, ..SOUND };
        refused(&lie.opcodes(), "in a storage of 6 elements");
    }
    let lie = Described { shape: &[1; 9], strides: &[1; 9], ..SOUND };
    refused(&lie.opcodes(), "a tensor of 9 axes");
    refused(&Described { strides: &[1], ..SOUND }.opcodes(), "a tensor of 2 axes and 1 strides");
}

#[test]
fn damaged_data_are_found_when_they_are_read() {
    let mut bytes = saved(&pickle(&SOUND.opcodes()), &[("0", &storage())]);
    let place = bytes.windows(4).position(|four| four == 5f32.to_le_bytes()).unwrap();
    bytes[place] ^= 1;
    let (_folder, path) = file(&bytes);
    let opened = PickledFile::open(&path).unwrap();
    let text = refusal(|| opened.read(opened.root().tensor().unwrap()));
    assert!(text.ends_with("the checksum of one of its entries differs"), "{text}");
}

#[test]
fn a_pickled_boolean_that_is_neither_is_refused() {
    let body = Described { class: "BoolStorage", elements: 2, shape: &[2], strides: &[1], ..SOUND };
    let (_folder, path) = file(&saved(&pickle(&body.opcodes()), &[("0", &[1, 2])]));
    let opened = PickledFile::open(&path).unwrap();
    let text = refusal(|| opened.read(opened.root().tensor().unwrap()));
    assert!(text.ends_with("holds a boolean that is neither 0 nor 1"), "{text}");
}

// Memory, depth, and what does not end.

#[test]
fn nesting_circles_and_many_references_are_bounded() {
    let mut deep = b"]q\x00".to_vec();
    deep.extend(b"]h\x00aq\x00".repeat(40));
    refused(&[&deep[..], b"h\x00"].concat(), "nests deeper than 32 levels");
    refused(b"]q\x00h\x00a", "nests deeper than 32 levels");
    // Each list holds the one before ten times: 10^20 values without a limit.
    let mut many = b"]q\x00".to_vec();
    (0..20).for_each(|_| many.extend([b"](", &b"h\x00".repeat(10)[..], b"eq\x00"].concat()));
    refused(&many, "holds more than 32768 values");
    refused(&b"N".repeat(70_000), "more than 65536 opcodes");
    let ninth = [b"ctorch\nSize\n", &numbers(&[1; 9])[..], b"\x85R"].concat();
    refused(&ninth, "calls Size");
}

#[test]
fn pickles_that_contradict_themselves_are_refused() {
    for (body, what) in [
        (&b""[..], "takes from an empty stack"),
        (b"(N\x85", "names"),
        (b"N(a", "takes from an empty stack"),
        (b"h\x07", "refers to object 7 before it exists"),
        (b"NNa", "adds to what is no list"),
        (b"}(Nu", "adds to what is no list or dictionary"),
        (b"\x8a\x09", "more than 64 bits"),
        (b"X\x02\0\0\0\xff\xff", "a text that is not UTF-8"),
        (b"X\xff\xff\xff\xff", "ends within an opcode"),
        (b"cos", "a name that does not end"),
        (b"NQ", "no storage of torch"),
        (b"ctorch\nFloatStorage\n", "holds a class or a storage where"),
        (b"}(]NNNu", "whose keys are no short texts"),
    ] {
        if what == "names" {
            assert!(opened(body).is_ok(), "an object below the mark is left alone");
        } else {
            refused(body, what);
        }
    }
    refused(&dictionary(&[("a", b"N"), ("a", b"N")]), "holds `a` twice");
    refused_bytes(&saved(b"\x80\x63N.", &[]), "protocol 99");
    refused_bytes(&saved(b"\x80\x02N", &[]), "ends within an opcode");
}

// The archive.

#[test]
fn archives_that_lie_are_refused() {
    let sound = saved(&pickle(b"N"), &[]);
    let end = sound.len() - 22;
    let with = |at: usize, bytes: &[u8]| {
        let mut archive = sound.clone();
        archive[at..at + bytes.len()].copy_from_slice(bytes);
        archive
    };
    let directory = u32::from_le_bytes(sound[end + 16..end + 20].try_into().unwrap()) as usize;
    for (bytes, what) in [
        (with(directory + 10, &[8]), "holds a compressed or encrypted entry `a/data.pkl`"),
        (with(directory + 8, &[1]), "holds a compressed or encrypted entry"),
        (with(directory + 24, &[200]), "of two sizes"),
        (with(directory + 42, &[3]), "does not begin where its directory says"),
        (with(directory, b"XX"), "a zip directory that is damaged"),
        (with(end + 10, &[3]), "a zip directory that ends within an entry"),
        (with(end + 12, &[255, 255, 255]), "has a zip directory of 2 entries in"),
        (with(end + 16, &[255; 4]), "has a zip directory that cannot be found"),
        (sound[..end].to_vec(), "is a zip archive without its directory"),
        (b"\x80\x02N.".to_vec(), "is a bare pickle, or one of torch before 1.6"),
        (
            b"\x1f\x8b\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
            "is compressed by gzip, and cut or damaged",
        ),
        (b"<!DOCTYPE html><html><body>".to_vec(), "is a web page (HTML)"),
        (Vec::new(), "is no archive that torch.save writes"),
        (zip(&[("a/data.pkl", b"N."), ("b/data.pkl", b"N.")]), "with 2 entries `<name>/data.pkl`"),
        (zip(&[("x/y/data.pkl", b"N.")]), "with 0 entries `<name>/data.pkl`"),
        (zip(&[("a/data.pkl", b"N."), ("a/data.pkl", b"N.")]), "holds two entries `a/data.pkl`"),
        (zip(&[("a/data.pkl", b"N."), ("a/byteorder", b"big")]), "holds big-endian numbers"),
        (zip(&[("a/data.pkl", &[b'N'; (4 << 20) + 1])]), "at most 4194304 are allowed"),
    ] {
        refused_bytes(&bytes, what);
    }
}

#[test]
fn a_zip_bomb_is_refused_by_its_directory() {
    // Many entries that are the same bytes.
    let mut archive = zip(&[("a/data.pkl", b"\x80\x02N."), ("b", &[0; 1000]), ("c", &[0; 1000])]);
    let end = archive.len() - 22;
    let directory = u32::from_le_bytes(archive[end + 16..end + 20].try_into().unwrap()) as usize;
    let second = directory + 46 + "a/data.pkl".len();
    let size = 2000u32.to_le_bytes();
    for entry in [second, second + 47] {
        archive[entry + 20..entry + 24].copy_from_slice(&size);
        archive[entry + 24..entry + 28].copy_from_slice(&size);
    }
    refused_bytes(&archive, "holds entries that are longer than the file together");
}

#[test]
fn what_is_no_file_is_not_opened() {
    assert_eq!(refusal(|| PickledFile::open("/dev/zero")), "/dev/zero: is not a regular file");
    assert_eq!(refusal(|| PickledFile::open("nowhere.pt")), "nowhere.pt: does not exist");
    let folder = tempfile::tempdir().unwrap();
    assert!(refusal(|| PickledFile::open(folder.path())).ends_with("is a folder, not a file"));
}
