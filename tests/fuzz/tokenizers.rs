//! Tokenizers, whose files people take from anywhere.

use std::fs;
use std::path::Path;

use fm_dist::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::hunt::{Prey, turn};
use crate::{as_it_is, hunted, told};

/// Words of all these files.
const WORDS: &[&[u8]] = &[
    b"added_tokens",
    b"additional_special_tokens",
    b"extra_special_tokens",
    b"added_tokens_decoder",
    b"content",
    b"normalized",
    b"lstrip",
    b"rstrip",
    b"single_word",
    b"special",
    b"type",
    b"BPE",
    b"Unigram",
    b"WordPiece",
    b"Sequence",
    b"Precompiled",
    b"NFC",
    b"Replace",
    b"Split",
    b"ByteLevel",
    b"Metaspace",
    b"TemplateProcessing",
    b"RobertaProcessing",
    b"Regex",
    b"Isolated",
    b"(?=a)|b*",
    b"unk_id",
    b"byte_fallback",
    b"vocab",
    b"merges",
    b"#version",
    b"</w>",
    b"<pad>",
    b"16777216",
    b"\x0a\x00",
    b"\x12\x02\x18\x02",
];
const TEXTS: [&str; 4] = ["", "a b A </s><pad>", " é\u{301}\u{1f600} aab", "<a>  a\n\n  1 "];

/// Opens a folder that has these files, and tokenizes.
fn opened(folder: &Path, config: &Value, files: &[(&str, &[u8])]) -> Result<(), String> {
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    for (name, bytes) in files {
        fs::write(folder.join(name), bytes).unwrap();
    }
    told(Tokenizer::open(folder).map(|tokenizer| {
        for (text, most) in TEXTS.into_iter().zip([0, 1, 7, 512]) {
            // The classes put two ids around a text at most.
            assert!(tokenizer.ids(text, most).len() <= most.max(2));
            assert!(tokenizer.ids_of_chat(text, most).len() <= most);
        }
    }))
}

/// A map that replaces `A` by `b`, as SentencePiece stores it.
fn charsmap() -> Vec<u8> {
    let mut units = vec![0u32; 512];
    units[0] = 256 << 10;
    units[256 ^ 0x41] = 0x41 | 1 << 8 | (256 ^ 0x41 ^ 2) << 10;
    units[2] = 1 << 31;
    let units: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
    [&(units.len() as u32).to_le_bytes()[..], &units, b"b\0"].concat()
}

fn token(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": true,
           "normalized": false, "special": true})
}

fn byte_pairs() -> Value {
    json!({
        "version": "1.0", "truncation": null,
        "padding": {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": null,
                    "pad_id": 5, "pad_type_id": 0, "pad_token": "<pad>"},
        "added_tokens": [token(5, "<pad>"), token(6, "<a>")],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+(?!\\S)|\\p{L}+"}, "behavior": "Isolated",
             "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
             "use_regex": false}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<a>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<a>": {"id": "<a>", "ids": [6], "tokens": ["<a>"]}}},
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "?", "fuse_unk": true,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "byte_fallback": true, "ignore_merges": false,
                  "vocab": {"?": 0, "a": 1, "b": 2, "aa": 3, "aab": 4},
                  "merges": ["a a", ["aa", "b"]]},
    })
}

fn scores() -> Value {
    use base64::Engine;
    let map = base64::engine::general_purpose::STANDARD.encode(charsmap());
    json!({
        "added_tokens": [token(0, "<pad>"), token(1, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": map},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                          "split": true},
        "post_processor": null, "decoder": null,
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": false,
                  "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.5],
                            ["a", -2.0], ["b", -2.5], ["▁", -3]]},
    })
}

#[test]
fn a_tokenizers_file_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let read = |bytes: &[u8]| {
        let is_scored = bytes.windows(7).any(|word| word == b"Unigram");
        let classes =
            [["Qwen2Tokenizer", "TokenizersBackend"], ["T5Tokenizer", "TokenizersBackend"]];
        let class = classes[usize::from(is_scored)][bytes.len() % 2];
        let config = json!({"tokenizer_class": class, "pad_token": "<pad>"});
        opened(folder.path(), &config, &[("tokenizer.json", bytes)])
    };
    hunted(&Prey {
        name: "tokenizer",
        sound: [byte_pairs(), scores()].iter().map(|file| file.to_string().into_bytes()).collect(),
        words: WORDS,
        dress: &as_it_is,
        read: &read,
    });
}

#[test]
fn a_vocabulary_and_its_merges_are_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let read = |bytes: &[u8]| {
        let at = bytes.windows(8).position(|word| word == b"#version").unwrap_or(bytes.len());
        let (vocab, merges) = bytes.split_at(at);
        let class = ["CLIPTokenizer", "Qwen2Tokenizer"][bytes.len() % 2];
        let config = json!({"tokenizer_class": class});
        opened(folder.path(), &config, &[("vocab.json", vocab), ("merges.txt", merges)])
    };
    let vocab = json!({"a": 0, "b": 1, "b</w>": 2, "aa": 3, "aab</w>": 4, "Ġ": 5,
                       "<|startoftext|>": 6, "<|endoftext|>": 7});
    let sound = format!("{vocab}#version: 0.2\na a\naa b</w>\n").into_bytes();
    hunted(&Prey {
        name: "vocabulary",
        sound: vec![sound],
        words: WORDS,
        dress: &as_it_is,
        read: &read,
    });
}

/// A field of a protocol buffer that has a length.
fn field(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let size = [length as u8 | 0x80, (length >> 7) as u8 | 0x80, (length >> 14) as u8];
    [&[tag << 3 | 2][..], &size, content].concat()
}

fn sentence_piece() -> Vec<u8> {
    let pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), ("▁a", 1), ("a", 1), ("bc", 4)];
    let piece = |(text, kind): &(&str, u8)| {
        let score = (-f32::from(*kind)).to_le_bytes();
        field(
            1,
            &[&field(1, text.as_bytes())[..], &[2 << 3 | 5], &score, &[3 << 3, *kind]].concat(),
        )
    };
    let pieces: Vec<u8> = pieces.iter().flat_map(piece).collect();
    [pieces, field(2, &[3 << 3, 1]), field(3, &field(2, &charsmap()))].concat()
}

#[test]
fn a_sentence_piece_model_is_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let config = json!({"tokenizer_class": "T5Tokenizer", "extra_ids": 3});
    let read = |bytes: &[u8]| opened(folder.path(), &config, &[("spiece.model", bytes)]);
    hunted(&Prey {
        name: "sentencepiece",
        sound: vec![sentence_piece()],
        words: WORDS,
        dress: &as_it_is,
        read: &read,
    });
}

#[test]
fn special_tokens_are_read_or_refused() {
    let _turn = turn();
    let folder = TempDir::new().unwrap();
    let read = |bytes: &[u8]| {
        // As a configuration, and as the older file beside one.
        let (config, map) = ("tokenizer_config.json", "special_tokens_map.json");
        let plain = json!({"tokenizer_class": "ByT5Tokenizer"});
        opened(folder.path(), &plain, &[(config, bytes), (map, b"{}")])?;
        opened(folder.path(), &plain, &[(map, bytes)])
    };
    let config = json!({
        "tokenizer_class": "ByT5Tokenizer", "extra_ids": 0, "padding_side": "left",
        "added_tokens_decoder": {"0": token(0, "<pad>"), "1": token(1, "</s>"),
                                 "2": token(2, "<unk>"), "259": token(259, "<a>")},
        "additional_special_tokens": ["<a>", {"__type": "AddedToken", "content": "<b>"}],
        "eos_token": "</s>", "pad_token": "<pad>", "unk_token": null, "image_token": "<i>",
    });
    let sound = vec![config.to_string().into_bytes()];
    hunted(&Prey { name: "special-tokens", sound, words: WORDS, dress: &as_it_is, read: &read });
}
