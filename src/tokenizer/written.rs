//! Normalizers, pre-tokenizers and post-processors as `tokenizer.json` describes them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;
use tokenizers::normalizers::{self, NormalizerWrapper};
use tokenizers::pre_tokenizers::{self, PreTokenizerWrapper};

use super::charsmap;

/// Longest description, twice that of NFKC's replacements.
const MAX_BYTES: usize = 1 << 20;
/// Most parts of a sequence.
const MAX_PARTS: usize = 8;

const NORMALIZERS: &[&str] =
    &["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "Strip", "StripAccents"];
const PRE_TOKENIZERS: &[&str] =
    &["ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace", "WhitespaceSplit"];

/// Ids that are put around those of a text.
#[derive(Debug, Default, PartialEq)]
pub struct Affixes {
    pub before: Vec<i64>,
    pub after: Vec<i64>,
}

/// # Errors
/// A text that names what is not supported.
pub fn normalizer(raw: Option<&RawValue>) -> Result<Option<NormalizerWrapper>, String> {
    parts(raw, "normalizers")?.map(normalizers_of).transpose()
}

fn normalizers_of(parts: Vec<Value>) -> Result<NormalizerWrapper, String> {
    let parts: Result<Vec<_>, String> = parts.iter().map(one_normalizer).collect();
    Ok(normalizers::Sequence::new(parts?).into())
}

fn one_normalizer(value: &Value) -> Result<NormalizerWrapper, String> {
    match map_of(value) {
        Some(map) => Ok(charsmap::precompiled(&map?)?.into()),
        None => known(value, NORMALIZERS),
    }
}

/// # Errors
/// A text that names what is not supported.
pub fn pre_tokenizer(raw: Option<&RawValue>) -> Result<Option<PreTokenizerWrapper>, String> {
    let Some(parts) = parts(raw, "pretokenizers")? else { return Ok(None) };
    let parts: Result<Vec<_>, String> =
        parts.iter().map(|part| known(part, PRE_TOKENIZERS)).collect();
    Ok(Some(pre_tokenizers::sequence::Sequence::new(parts?).into()))
}

/// The replacements within a normalizer, which some classes take alone.
///
/// # Errors
/// A text, if they are broken.
pub fn replacements(raw: Option<&RawValue>) -> Result<Option<Vec<u8>>, String> {
    let parts = parts(raw, "normalizers")?.unwrap_or_default();
    parts.iter().find_map(map_of).transpose()
}

/// The ids that a post-processor puts around those of a text.
///
/// # Errors
/// A text that names what is not supported.
pub fn affixes(raw: Option<&RawValue>) -> Result<Affixes, String> {
    let mut affixes = Affixes::default();
    for part in parts(raw, "processors")?.unwrap_or_default() {
        let (before, after) = around(&part)?;
        affixes.before.splice(0..0, before);
        affixes.after.extend(after);
    }
    Ok(affixes)
}

fn around(part: &Value) -> Result<(Vec<i64>, Vec<i64>), String> {
    let pair = |name: &str| {
        let id = part[name][1].as_i64();
        id.map(|id| vec![id]).ok_or_else(|| format!("its post_processor has no {name}"))
    };
    match kind(part) {
        "ByteLevel" => Ok((Vec::new(), Vec::new())),
        "RobertaProcessing" | "BertProcessing" => Ok((pair("cls")?, pair("sep")?)),
        "TemplateProcessing" => template(part),
        other => Err(format!("post-processor {other:?} is not supported")),
    }
}

/// Ids before and after the text of a template.
fn template(part: &Value) -> Result<(Vec<i64>, Vec<i64>), String> {
    let unsound = || "its post_processor's template is broken".to_string();
    let pieces = part["single"].as_array().ok_or_else(unsound)?;
    let is_text = |piece: &Value| piece["Sequence"]["id"] == "A";
    let ids = |pieces: &[Value]| -> Option<Vec<i64>> {
        let ids = |piece: &Value| {
            part["special_tokens"][piece["SpecialToken"]["id"].as_str()?]["ids"]
                .as_array()?
                .iter()
                .map(Value::as_i64)
                .collect::<Option<Vec<_>>>()
        };
        pieces.iter().map(ids).collect::<Option<Vec<_>>>().map(|ids| ids.concat())
    };
    let at = pieces.iter().position(is_text).ok_or_else(unsound)?;
    let around = ids(&pieces[..at]).zip(ids(&pieces[at + 1..]));
    around.ok_or_else(unsound)
}

/// The parts of a description: those of a sequence, else itself.
fn parts(raw: Option<&RawValue>, name: &str) -> Result<Option<Vec<Value>>, String> {
    let Some(raw) = raw else { return Ok(None) };
    if raw.get().len() > MAX_BYTES {
        return Err(format!("{name} are longer than the {MAX_BYTES} bytes allowed"));
    }
    let mut value: Value = serde_json::from_str(raw.get()).map_err(|error| error.to_string())?;
    if value.is_null() {
        return Ok(None);
    }
    let parts = match value[name].take() {
        Value::Array(parts) if kind(&value) == "Sequence" => parts,
        _ => vec![value],
    };
    match parts.len() > MAX_PARTS {
        true => Err(format!("{} {name} are more than the {MAX_PARTS} allowed", parts.len())),
        false => Ok(Some(parts)),
    }
}

fn kind(value: &Value) -> &str {
    value["type"].as_str().unwrap_or_default()
}

fn known<T: DeserializeOwned>(value: &Value, names: &[&str]) -> Result<T, String> {
    let kind = kind(value);
    if !names.contains(&kind) {
        return Err(format!("{kind:?} is not supported; supported are {}", names.join(", ")));
    }
    T::deserialize(value).map_err(|error| format!("{kind}: {error}"))
}

/// SentencePiece's replacements, if the value holds them.
fn map_of(value: &Value) -> Option<Result<Vec<u8>, String>> {
    let text = value["precompiled_charsmap"].as_str().filter(|_| kind(value) == "Precompiled")?;
    Some(STANDARD.decode(text).map_err(|error| format!("precompiled_charsmap: {error}")))
}
