//! The header of a safetensors file: JSON with the name, kind, shape and offsets of each tensor.
//!
//! A header is untrusted input, and any of its numbers may be wrong. Each is checked before use,
//! and none decides how much memory is allocated: the limits below bound a hostile header at a few
//! tens of megabytes.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use tch::Kind;

use crate::error::one_line;

/// Longest header that is read. A real one takes about 100 bytes for each tensor.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Maximum number of tensors, and of metadata entries, in one file.
const MAX_ENTRIES: usize = 65_536;
const MAX_NAME_BYTES: usize = 128;
const MAX_AXES: usize = 8;
/// Longest reason in an error: serde quotes its input, which may be megabytes.
const MAX_REASON_CHARS: usize = 300;
/// The one key of the header that is not a tensor.
pub(super) const METADATA: &str = "__metadata__";

const DTYPES: [(&str, Kind); 12] = [
    ("BOOL", Kind::Bool),
    ("U8", Kind::Uint8),
    ("I8", Kind::Int8),
    ("F8_E4M3", Kind::Float8e4m3fn),
    ("F8_E5M2", Kind::Float8e5m2),
    ("I16", Kind::Int16),
    ("I32", Kind::Int),
    ("I64", Kind::Int64),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("F32", Kind::Float),
    ("F64", Kind::Double),
];

/// Returns the format's name of a kind; `None` if the format or this program has none.
pub(super) fn dtype_of(kind: Kind) -> Option<&'static str> {
    DTYPES.iter().find(|(_, known)| *known == kind).map(|(word, _)| *word)
}

/// The purpose of a file, which decides what it may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Checkpoints, adapters, conditions and batches, whose numbers are computed with as they are.
    Tensors,
    /// Weights that a model begins with, which may be floats of 8 bits: they are widened.
    Weights,
    /// A file of a dataset, which may hold floats of 8 bits: batches widen them.
    Samples,
    /// The cache of another program, which may also hold tensors without elements, as a text of no
    /// tokens is stored.
    Cache,
}

impl Content {
    fn allows(self, kind: Kind) -> bool {
        self != Content::Tensors || !is_eight_bits(kind)
    }
}

/// True for floats of 8 bits.
pub(crate) fn is_eight_bits(kind: Kind) -> bool {
    matches!(kind, Kind::Float8e4m3fn | Kind::Float8e5m2)
}

/// One tensor of a file: its name, kind, shape and offset.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    pub kind: Kind,
    pub shape: Vec<i64>,
    /// First byte, counted from the end of the header.
    pub offset: u64,
    pub bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Header {
    /// Tensors in the order of their data in the file.
    pub tensors: Vec<TensorInfo>,
    pub metadata: BTreeMap<String, String>,
}

/// Refuses a header that would cost more memory than any real one needs.
pub(super) fn check_length(bytes: u64) -> Result<(), String> {
    if bytes > MAX_HEADER_BYTES {
        return Err(format!(
            "header of {bytes} bytes is longer than the {MAX_HEADER_BYTES} allowed"
        ));
    }
    Ok(())
}

/// Parses and checks a header over `data_bytes` of tensor data; the error is a reason on one line.
pub(super) fn parse(text: &[u8], data_bytes: u64, content: Content) -> Result<Header, String> {
    let text = std::str::from_utf8(text)
        .map_err(|e| format!("header is not UTF-8 from byte {} on", e.valid_up_to()))?;
    if !text.starts_with('{') {
        return Err("header does not begin with `{`".into());
    }
    let raw: RawHeader =
        serde_json::from_str(text).map_err(|e| shortened(&format!("header is malformed: {e}")))?;
    let mut tensors = raw
        .tensors
        .into_iter()
        .map(|(name, entry)| entry.checked(name, content))
        .collect::<Result<Vec<_>, String>>()?;
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    check_cover(&tensors, data_bytes)?;
    Ok(Header { tensors, metadata: raw.metadata.unwrap_or_default().0 })
}

/// Checks that tensors are contiguous from byte 0 to the end of the file, without overlaps or gaps.
fn check_cover(tensors: &[TensorInfo], data_bytes: u64) -> Result<(), String> {
    let mut end = 0;
    for TensorInfo { name, offset, bytes, .. } in tensors {
        if *offset != end {
            let what = if *offset < end {
                "overlaps the tensor before it"
            } else {
                "leaves a hole before it"
            };
            return Err(format!(
                "tensor `{name}` {what}: begins at byte {offset} of the data, expected {end}"
            ));
        }
        // `checked` ensures that `offset + bytes` is the entry's own end.
        end = offset + bytes;
    }
    if end != data_bytes {
        return Err(format!("tensors end at byte {end} of the data, the file at {data_bytes}"));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), String> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let fits = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(legal);
    if !fits || name.starts_with('.') || name.contains("..") {
        let shown: String = name.chars().take(MAX_NAME_BYTES).collect();
        return Err(format!(
            "illegal tensor name `{shown}`; expected 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 . _ - without leading or double dots"
        ));
    }
    Ok(())
}

fn shortened(reason: &str) -> String {
    let reason = one_line(reason);
    match reason.char_indices().nth(MAX_REASON_CHARS) {
        Some((end, _)) => format!("{}…", &reason[..end]),
        None => reason,
    }
}

/// A tensor's entry as written in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Axes,
    data_offsets: [u64; 2],
}

impl Entry {
    fn checked(self, name: String, content: Content) -> Result<TensorInfo, String> {
        let least = if content == Content::Cache { 0 } else { 1 };
        if let Some(axis) = self.shape.0.iter().find(|axis| **axis < least) {
            return Err(format!(
                "tensor `{name}` {:?} has an axis of {axis}, expected at least 1; leave empty tensors out",
                self.shape.0
            ));
        }
        let kind =
            self.kind(content).map_err(|what| shortened(&format!("tensor `{name}` {what}")))?;
        let [begin, end] = self.data_offsets;
        let bytes = self.bytes(kind).ok_or_else(|| {
            format!("tensor `{name}` of shape {:?} is larger than any file", self.shape.0)
        })?;
        if begin.checked_add(bytes) != Some(end) {
            let shape = &self.shape.0;
            return Err(format!(
                "tensor `{name}` {} {shape:?} takes {bytes} bytes, its offsets say {begin} to {end}",
                self.dtype
            ));
        }
        Ok(TensorInfo { name, kind, shape: self.shape.0, offset: begin, bytes })
    }

    fn kind(&self, content: Content) -> Result<Kind, String> {
        let allowed = || DTYPES.iter().filter(|(_, kind)| content.allows(*kind));
        if let Some((_, kind)) = allowed().find(|(word, _)| *word == self.dtype) {
            return Ok(*kind);
        }
        let is_known = DTYPES.iter().any(|(word, _)| *word == self.dtype);
        let where_else = if is_known {
            ", which only weights and the samples of a dataset may have"
        } else {
            ""
        };
        let words: Vec<&str> = allowed().map(|(word, _)| *word).collect();
        Err(format!("has dtype `{}`{where_else}; expected one of {}", self.dtype, words.join(" ")))
    }

    /// Returns the size of the tensor; `None` if it exceeds 63 bits, which no file's size does.
    fn bytes(&self, kind: Kind) -> Option<u64> {
        let element = i64::try_from(kind.elt_size_in_bytes()).ok()?;
        self.shape
            .0
            .iter()
            .try_fold(element, |product, axis| product.checked_mul(*axis))?
            .try_into()
            .ok()
    }
}

/// A shape, refused at its ninth axis rather than after its millionth.
struct Axes(Vec<i64>);

impl<'de> Deserialize<'de> for Axes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AxesVisitor;

        impl<'de> Visitor<'de> for AxesVisitor {
            type Value = Axes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MAX_AXES} axes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Axes, A::Error> {
                let mut axes = Vec::new();
                while let Some(axis) = seq.next_element::<i64>()? {
                    if axes.len() == MAX_AXES {
                        return Err(A::Error::custom(format!(
                            "a shape has more than {MAX_AXES} axes"
                        )));
                    }
                    axes.push(axis);
                }
                Ok(Axes(axes))
            }
        }
        deserializer.deserialize_seq(AxesVisitor)
    }
}

/// The header's JSON object: unique names, at most [`MAX_ENTRIES`] of them.
#[derive(Default)]
struct RawHeader {
    tensors: BTreeMap<String, Entry>,
    metadata: Option<Metadata>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut raw = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        let metadata = map.next_value()?;
                        if raw.metadata.replace(metadata).is_some() {
                            return Err(A::Error::custom(format!("duplicate `{METADATA}`")));
                        }
                    } else {
                        check_name(&name).map_err(A::Error::custom)?;
                        let entry = map.next_value().map_err(|error| {
                            A::Error::custom(format!("tensor `{name}`: {error}"))
                        })?;
                        insert_once(&mut raw.tensors, name, entry, "tensor")?;
                    }
                }
                Ok(raw)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Free text by key; keys are unique.
#[derive(Default)]
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;

        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut metadata = Metadata::default();
                while let Some(key) = map.next_key::<String>()? {
                    insert_once(&mut metadata.0, key, map.next_value()?, "metadata key")?;
                }
                Ok(metadata)
            }
        }
        deserializer.deserialize_map(MetadataVisitor)
    }
}

fn insert_once<T, E: de::Error>(
    entries: &mut BTreeMap<String, T>,
    name: String,
    value: T,
    what: &str,
) -> Result<(), E> {
    if entries.contains_key(&name) {
        return Err(E::custom(format!("duplicate {what} `{name}`")));
    }
    if entries.len() == MAX_ENTRIES {
        return Err(E::custom(format!("more than {MAX_ENTRIES} entries")));
    }
    entries.insert(name, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_in_the_order_of_the_file_whatever_the_order_of_the_header() {
        let text = r#"{"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]},"a":{"dtype":"I32","shape":[],"data_offsets":[0,4]}}   "#;
        let header = parse(text.as_bytes(), 8, Content::Tensors).expect("a sound header");
        let names: Vec<&str> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(header.tensors[0].shape.is_empty(), "a scalar has no axes");
    }

    #[test]
    fn a_reason_is_short_and_on_one_line() {
        let text = format!(r#"{{"a":{{"{}\n":1}}}}"#, "x".repeat(1 << 20));
        let reason = parse(text.as_bytes(), 0, Content::Tensors).expect_err("an unknown field");
        assert!(reason.chars().count() <= MAX_REASON_CHARS + 1, "{}", reason.len());
        assert!(
            reason.starts_with("header is malformed: tensor `a`: unknown field `xxx"),
            "{reason}"
        );
    }

    #[test]
    fn every_kind_has_its_own_word() {
        for (word, kind) in DTYPES {
            assert_eq!(dtype_of(kind), Some(word));
        }
        assert_eq!(dtype_of(Kind::ComplexFloat), None);
    }
}
