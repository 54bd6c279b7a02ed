//! Recognizes files of an unexpected format by their first bytes: failed downloads, archives,
//! formats of other programs.

use crate::error::one_line;

/// Number of first bytes that are examined; a tar archive has its mark at byte 257.
pub const HEAD_BYTES: usize = 512;
/// Number of characters of an unknown text that a message quotes.
const QUOTED_CHARS: usize = 40;

/// The format that a file was expected to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    SafeTensors,
    /// A safetensors file of a dataset or of a cache.
    Samples,
    /// What `torch.save` writes; read by importers only.
    Archive,
    Json,
    Toml,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::SafeTensors | Format::Samples => "a safetensors file",
            Format::Archive => "an archive of torch.save",
            Format::Json => "JSON",
            Format::Toml => "TOML",
        }
    }
}

/// A command that converts a pickle of tensors, also one that contains texts, numbers, lists and
/// nested tables.
///
/// Names of nested tensors are joined by dots; a file of one bare tensor gives `tensor`.
/// `weights_only` keeps the pickle from running code.
pub const CONVERT: &str = "python3 -c 'import re,sys,torch,safetensors.torch; \
    f=lambda n,x:{re.sub(r\"(?a)[^\\w.-]+\",\"_\",n).strip(\".\") or \"tensor\":x.detach().contiguous().clone()} if torch.is_tensor(x) \
    else {k:t for a,b in (x.items() if isinstance(x,dict) else enumerate(x) if isinstance(x,(list,tuple)) else ()) \
    for k,t in f(f\"{n}.{a}\",b).items()}; \
    safetensors.torch.save_file(f(\"\",torch.load(sys.argv[1],\"cpu\",weights_only=True)),sys.argv[2])' IN.pt OUT.safetensors";

/// Says how pickles become a dataset.
pub const IMPORT: &str = "if it is of a trainer's cache, `fm-dist data import --from nemo SRC --out DIR` \
    makes a dataset of it (also --from musubi, diffusion-pipe, simpletuner, ai-toolkit)";

/// Offset and bytes of a mark, and a description of files that have it.
const MAGIC: &[(usize, &[u8], &str)] = &[
    (
        0,
        b"GGUF",
        "is a GGUF file, whose quantized weights are not read; take the model's safetensors",
    ),
    (0, b"\x93NUMPY", "is a NumPy array; convert it once by safetensors.numpy.save_file"),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file; convert it once by safetensors.numpy.save_file"),
    (0, b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (0, b"BZh", "is a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ\0", "is an xz archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "is a Zstandard archive; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (0, b"Rar!\x1a\x07", "is a RAR archive; unpack it first"),
    (257, b"ustar", "is a tar archive; unpack it first"),
    (0, b"PAR1", "is a Parquet file"),
    (0, b"ARROW1", "is an Arrow file"),
    (0, b"SQLite format 3\0", "is an SQLite database"),
    (0, b"\x89PNG\r\n\x1a\n", "is a PNG picture"),
    (0, b"\xff\xd8\xff", "is a JPEG picture"),
    (0, b"GIF8", "is a GIF picture"),
    (0, b"RIFF", "is a RIFF file: a WebP picture, an AVI video or sound"),
    (4, b"ftyp", "is an MP4 video"),
    (0, b"%PDF", "is a PDF document"),
    (0, b"\x7fELF", "is a program"),
];

/// Describes a file whose first bytes are `head`, and what to do, if it is not of the `expected`
/// format.
///
/// `head`: the first [`HEAD_BYTES`], or all of a shorter file.
pub fn recognized(head: &[u8], expected: Format) -> Option<String> {
    pickled(head, expected)
        .or_else(|| by_magic(head, expected))
        .or_else(|| encoded(head))
        .or_else(|| text(head, expected))
}

/// Returns the reason why bytes are not JSON: their format if it is recognized, the parser's
/// message otherwise.
pub fn no_json(bytes: &[u8], error: &serde_json::Error) -> String {
    recognized(&bytes[..bytes.len().min(HEAD_BYTES)], Format::Json)
        .unwrap_or_else(|| one_line(&error.to_string()))
}

fn by_magic(head: &[u8], expected: Format) -> Option<String> {
    let found = MAGIC
        .iter()
        .find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    let found = found.map(|(.., what)| format!("{what}; expected {}", expected.name()));
    let is_safetensors = head.len() > 9 && head[4..8] == [0; 4] && head[8..10] == *b"{\"";
    let safetensors = || format!("is a safetensors file; expected {}", expected.name());
    let is_expected = matches!(expected, Format::SafeTensors | Format::Samples);
    found.or_else(|| (is_safetensors && !is_expected).then(safetensors))
}

/// Recognizes zip archives, which `torch.save` writes, and bare pickles, unless they are expected.
fn pickled(head: &[u8], expected: Format) -> Option<String> {
    let what = match head {
        _ if expected == Format::Archive => return None,
        [b'P', b'K', 3, 4, ..] if named_first(head).ends_with(b".npy") => {
            return Some(
                "is a NumPy archive (.npz); convert it once by safetensors.numpy.save_file".into(),
            );
        }
        [b'P', b'K', 3, 4, ..] if is_pickle_archive(named_first(head)) => {
            "is a pickle that torch.save wrote (.pt, .meta)"
        }
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => {
            "is a zip archive, perhaps a pickle that torch.save wrote"
        }
        // The opcode PROTO, the protocol, and an opcode that can follow in a pickle.
        [0x80, 2..=5, next, ..] if b"\x8a\x95}](N)cXqKM\x8c\x88\x89GJ".contains(next) => {
            "is a pickle"
        }
        _ => return None,
    };
    Some(format!("{what}, {}", never_read(expected == Format::Samples)))
}

/// Says that a pickle is not read, and what to do with it. `of_data`: it stands where samples are
/// expected.
pub(super) fn never_read(of_data: bool) -> String {
    let instead = if of_data { IMPORT.to_string() } else { format!("convert it once: {CONVERT}") };
    format!("which can run code when it is opened and is never read; {instead}")
}

/// Returns the name of a zip archive's first entry, as far as `head` contains it.
fn named_first(head: &[u8]) -> &[u8] {
    let length =
        head.get(26..28).map_or(0, |bytes| usize::from(u16::from_le_bytes([bytes[0], bytes[1]])));
    head.get(30..).map_or(&[], |rest| &rest[..length.min(rest.len())])
}

fn is_pickle_archive(name: &[u8]) -> bool {
    [b"/data.pkl".as_slice(), b"/version", b"/byteorder", b"/.format_version"]
        .iter()
        .any(|ending| name.ends_with(ending))
}

/// Recognizes encodings other than plain UTF-8.
fn encoded(head: &[u8]) -> Option<String> {
    // Latin letters have a zero in every second byte.
    let wide = |first: usize| {
        head.len() >= 4
            && head.iter().take(8).enumerate().all(|(at, byte)| (*byte == 0) == (at % 2 == first))
    };
    if head.starts_with(b"\xef\xbb\xbf") {
        Some("begins with a byte order mark; save it as UTF-8 without one (without BOM)".into())
    } else if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") || wide(0) || wide(1) {
        Some("is UTF-16; save it as UTF-8".into())
    } else {
        None
    }
}

/// Recognizes texts found in place of a file.
fn text(head: &[u8], expected: Format) -> Option<String> {
    let whole = String::from_utf8_lossy(head);
    let begin = whole.trim_start().to_ascii_lowercase();
    let again = "download the file itself again, logged in where its address asks for that";
    if begin.starts_with("version https://git-lfs") {
        return Some("is a Git LFS pointer, which stands for the file; fetch the file by `git lfs pull` in its repository".into());
    }
    if begin.starts_with("<!doctype html")
        || begin.starts_with("<html")
        || begin.starts_with("<head")
        || begin.starts_with("<script")
    {
        return Some(format!("is a web page (HTML), not {}; {again}", expected.name()));
    }
    if begin.starts_with("<?xml") || begin.starts_with("<error") {
        return Some(format!(
            "is an XML text, as a storage server answers in place of a file; {again}"
        ));
    }
    let strange = |c: char| c == '\u{fffd}' || c.is_control() && !c.is_whitespace();
    // The head of a longer file may end within a character.
    let whole = if head.len() == HEAD_BYTES { whole.trim_end_matches('\u{fffd}') } else { &whole };
    let is_text = !whole.trim().is_empty() && !whole.contains(strange);
    let quoted = whole.trim().chars().take(QUOTED_CHARS).collect::<String>();
    match expected {
        Format::SafeTensors | Format::Samples | Format::Archive
            if is_text && begin.starts_with('{') =>
        {
            Some(format!("is JSON, not {}; {again}", expected.name()))
        }
        Format::SafeTensors | Format::Samples | Format::Archive if is_text && head.len() >= 8 => {
            Some(format!("is a text that begins {quoted:?}, not {}; {again}", expected.name()))
        }
        Format::Json if head.is_empty() => Some("is empty; expected JSON".into()),
        Format::Json if is_text && !begin.starts_with(['{', '[']) => {
            Some(format!("is a text that begins {quoted:?}, not JSON"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar() -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[..6].copy_from_slice(b"a.json");
        head[257..262].copy_from_slice(b"ustar");
        head
    }

    fn zip(name: &str) -> Vec<u8> {
        let length = (name.len() as u16).to_le_bytes();
        [b"PK\x03\x04".as_slice(), &[0; 22], &length, &[0, 0], name.as_bytes()].concat()
    }

    #[test]
    fn what_comes_in_place_of_a_file_is_called_what_it_is() {
        let described = |head: &[u8]| {
            recognized(head, Format::SafeTensors)
                .unwrap_or_else(|| panic!("{head:?} is not recognized"))
        };
        for (head, what) in [
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n".to_vec(),
                "is a Git LFS pointer",
            ),
            (b"\n<!DOCTYPE html>\n<html>".to_vec(), "is a web page (HTML)"),
            (b"<HTML><head>".to_vec(), "is a web page (HTML)"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code>".to_vec(), "is an XML text"),
            (b"<Error><Code>NoSuchKey</Code></Error>".to_vec(), "is an XML text"),
            (b"{\"error\": \"not found\"}".to_vec(), "is JSON, not a safetensors file"),
            (
                b"Entry not found".to_vec(),
                "is a text that begins \"Entry not found\", not a safetensors file",
            ),
            (zip("archive/data.pkl"), "is a pickle that torch.save wrote"),
            (zip("a/.format_version"), "is a pickle that torch.save wrote"),
            (zip("arr_0.npy"), "is a NumPy archive (.npz); convert it once by safetensors.numpy"),
            (zip("a.txt"), "is a zip archive"),
            (b"\x80\x04N.".to_vec(), "is a pickle, which can run code"),
            (b"\x80\x02}q\x00.".to_vec(), "is a pickle, which can run code"),
            (
                b"\x80\x02\x8a\nl\xfcF\x9cF\xf9 j\xa8P\x19.\x80\x02M".to_vec(),
                "is a pickle, which can run code",
            ),
            (b"\x1f\x8b\x08\0\0\0\0\0".to_vec(), "is a gzip archive"),
            (b"GGUF\x03\0\0\0".to_vec(), "is a GGUF file"),
            (b"\x93NUMPY\x01\0v\0".to_vec(), "is a NumPy array"),
            (b"\x89PNG\r\n\x1a\n\0".to_vec(), "is a PNG picture"),
            (tar(), "is a tar archive"),
        ] {
            assert!(described(&head).starts_with(what), "{what}: {}", described(&head));
        }
    }

    #[test]
    fn encodings_of_texts_are_told() {
        let described = |head: &[u8]| recognized(head, Format::Json).unwrap_or_default();
        assert!(described(b"\xef\xbb\xbf{}").contains("byte order mark"));
        let utf_16: Vec<u8> = "{\"a\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(described(&utf_16), "is UTF-16; save it as UTF-8");
        assert_eq!(
            described(&[b"\xff\xfe", utf_16.as_slice()].concat()),
            "is UTF-16; save it as UTF-8"
        );
        let big: Vec<u8> = "{\"a\": 1}".encode_utf16().flat_map(u16::to_be_bytes).collect();
        assert_eq!(described(&big), "is UTF-16; save it as UTF-8");
    }

    #[test]
    fn a_pickle_is_to_be_converted_or_imported_where_samples_are_expected() {
        let pickle = zip("archive/data.pkl");
        let described = |expected| recognized(&pickle, expected).unwrap_or_default();
        assert!(described(Format::SafeTensors).ends_with(CONVERT));
        assert!(described(Format::Samples).ends_with(&format!("is never read; {IMPORT}")));
        assert_eq!(described(Format::Archive), "");
    }

    #[test]
    fn a_format_is_not_taken_for_another_where_it_is_expected() {
        let safetensors = b"\x40\0\0\0\0\0\0\0{\"a\":{\"dtype\":\"F32\"";
        assert_eq!(recognized(safetensors, Format::SafeTensors), None);
        assert_eq!(recognized(safetensors, Format::Samples), None);
        assert!(
            recognized(safetensors, Format::Json)
                .is_some_and(|what| what == "is a safetensors file; expected JSON")
        );
        assert_eq!(
            recognized(b"{\"a\": 1,", Format::Json),
            None,
            "a mistake in JSON is the parser's to tell"
        );
        assert_eq!(recognized(b"seed = 1", Format::Toml), None);
        assert_eq!(recognized(&[1; 7], Format::SafeTensors), None);
        assert_eq!(recognized(&[0xff; 100], Format::SafeTensors), None);
        assert!(recognized(b"", Format::Json).is_some_and(|what| what.starts_with("is empty")));
    }
}
