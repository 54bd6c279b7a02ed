//! Tokenizers: texts to the token ids of text encoders, as transformers makes them of published
//! folders; and the texts that each family's pipeline makes of a prompt.
//!
//! transformers builds a tokenizer by its class, which `tokenizer_config.json` names: of
//! `tokenizer.json` most classes take vocabulary and merges alone, and know the rest themselves. So
//! does [`Tokenizer::open`].
//!
//! | module | holds |
//! |---|---|
//! | here | [`Tokenizer`]: text to ids, cut to a length |
//! | `class` | the classes, and what each builds |
//! | `clip`, `qwen2`, `t5` | one class each |
//! | `folder` | files of a folder, within limits |
//! | `config` | `tokenizer_config.json` and the files that older versions wrote beside it |
//! | `word` | special and added tokens as those files describe them |
//! | `vocabulary` | `tokenizer.json`, `vocab.json` and `merges.txt` |
//! | `sentencepiece` | SentencePiece models |
//! | `charsmap` | the replacements that SentencePiece applies to a text first |
//! | `written` | what `tokenizer.json` describes around its model |
//! | `bytes` | ByT5's bytes |
//! | [`prompt`] | from prompts to the texts that are tokenized |
//!
//! Source: transformers 5.24.0, `tokenization_utils_tokenizers.py` and the classes' own files;
//! tokens are equal to its.

mod bytes;
mod charsmap;
mod class;
mod clip;
mod config;
mod folder;
mod qwen2;
mod sentencepiece;
mod t5;
mod vocabulary;
mod word;
mod written;

pub mod prompt;

use std::path::Path;

use crate::error::{Error, Result};

use bytes::ByteTokenizer;
use class::{Built, Class};
use config::Config;
use folder::Folder;
use vocabulary::TokenizerFile;
use written::Affixes;

/// A tokenizer of a published folder.
#[derive(Debug)]
pub struct Tokenizer {
    model: Model,
    affixes: Affixes,
    pad_id: i64,
    pads_left: bool,
    cuts_left: bool,
}

#[derive(Debug)]
enum Model {
    Learned(Box<tokenizers::Tokenizer>),
    Bytes(ByteTokenizer),
}

impl Tokenizer {
    /// Opens a folder `tokenizer`, `tokenizer_2` of a pipeline, in any published layout.
    ///
    /// # Errors
    /// [`Error::Data`] for a class that is unknown, and for files that are missing, malformed, too
    /// long or not supported.
    pub fn open(folder: &Path) -> Result<Self> {
        let folder = Folder(folder);
        let file = TokenizerFile::read(folder)?;
        let config = Config::read(folder, file.as_ref())?;
        let class = Class::of(folder, &config, file.as_ref())?;
        let padding = file.as_ref().and_then(|file| file.padding.as_ref());
        let pads_left = config.is_left("padding_side", padding.map(|padding| &padding.direction));
        let truncation = file.as_ref().and_then(|file| file.truncation.as_ref());
        let cuts_left = config.is_left("truncation_side", truncation.map(|cut| &cut.direction));
        let pad = class.named("pad_token").or(padding.map(|padding| padding.pad_token.as_str()));
        let pad = config.named("pad_token", pad);
        let pad = pad.ok_or_else(|| Error::data(folder.0, "names no pad_token"))?;
        let Built { model, affixes } = class::build(class, folder, &config, file)?;
        let no_token = || format!("its pad_token {:?} is no token", pad.text());
        let pad_id = model.id(pad.text()).ok_or_else(|| Error::data(folder.0, no_token()))?;
        Ok(Tokenizer { model, affixes, pad_id, pads_left, cuts_left })
    }

    /// Returns the ids of a text, with those that the tokenizer puts around it, at most `most`; no
    /// padding.
    ///
    /// As transformers' `tokenizer(text, truncation=True, max_length=most)`: of a text that is too
    /// long, an end token stays.
    pub fn ids(&self, text: &str, most: usize) -> Vec<i64> {
        let Affixes { before, after } = &self.affixes;
        let room = most.saturating_sub(before.len() + after.len());
        let ids = self.cut(self.model.ids(text), room);
        let is_ended = self.model.ends_once() && ids.last() == after.last();
        let after = if is_ended { &[] } else { &after[..] };
        [before, &ids[..], after].concat()
    }

    /// Returns the ids of a text that spells all its special tokens, as chat templates do: nothing
    /// is put around it.
    pub fn ids_of_chat(&self, text: &str, most: usize) -> Vec<i64> {
        self.cut(self.model.ids(text), most)
    }

    fn cut(&self, mut ids: Vec<i64>, most: usize) -> Vec<i64> {
        let surplus = ids.len().saturating_sub(most);
        if self.cuts_left {
            ids.drain(..surplus);
        }
        ids.truncate(most);
        ids
    }

    pub fn pad_id(&self) -> i64 {
        self.pad_id
    }

    /// True if padding goes before a text.
    pub fn pads_left(&self) -> bool {
        self.pads_left
    }
}

impl Model {
    fn learned(tokenizer: tokenizers::Tokenizer) -> Self {
        Model::Learned(Box::new(tokenizer))
    }

    fn ids(&self, text: &str) -> Vec<i64> {
        match self {
            Model::Learned(tokenizer) => {
                let encoding = tokenizer.encode_fast(text, false);
                let encoding = encoding.expect("unknown tokens were looked for at opening");
                encoding.get_ids().iter().map(|id| i64::from(*id)).collect()
            }
            Model::Bytes(tokenizer) => tokenizer.ids(text),
        }
    }

    /// True if an end token that a text itself ends with is not repeated.
    fn ends_once(&self) -> bool {
        matches!(self, Model::Bytes(_))
    }

    fn id(&self, text: &str) -> Option<i64> {
        match self {
            Model::Learned(tokenizer) => tokenizer.token_to_id(text).map(i64::from),
            Model::Bytes(tokenizer) => tokenizer.id(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;

    fn folder(files: &[(&str, Value)]) -> TempDir {
        let folder = TempDir::new().expect("a folder");
        for (name, value) in files {
            let text = value.as_str().map_or_else(|| value.to_string(), Into::into);
            fs::write(folder.path().join(name), text).expect("a file");
        }
        folder
    }

    /// The refusal of a folder, without its path.
    fn said(files: &[(&str, Value)]) -> String {
        let folder = folder(files);
        let error = Tokenizer::open(folder.path()).expect_err("it lies").to_string();
        let rest = error.strip_prefix(&folder.path().display().to_string());
        rest.expect("the folder first").to_string()
    }

    const CONFIG: &str = "tokenizer_config.json";
    const FILE: &str = "tokenizer.json";

    #[test]
    fn an_end_token_stays_and_is_not_repeated_after_bytes() {
        let folder = folder(&[(CONFIG, json!({"tokenizer_class": "ByT5Tokenizer"}))]);
        let tokenizer = Tokenizer::open(folder.path()).expect("a tokenizer");
        assert_eq!(tokenizer.ids("abc", 9), [100, 101, 102, 1]);
        assert_eq!(tokenizer.ids("abc", 3), [100, 101, 1]);
        assert_eq!(tokenizer.ids("a </s>", 9), [100, 1]);
        assert_eq!(tokenizer.ids("", 1), [1]);
        assert_eq!(tokenizer.ids_of_chat("abc", 2), [100, 101]);
        assert_eq!((tokenizer.pad_id(), tokenizer.pads_left()), (0, false));
    }

    #[test]
    fn folders_without_what_a_class_needs_are_refused() {
        let class = |name: &str| (CONFIG, json!({"tokenizer_class": name, "pad_token": "<pad>"}));
        assert_eq!(said(&[]), ": holds no tokenizer_config.json that names its tokenizer_class");
        assert_eq!(
            said(&[class("BertTokenizerFast")]),
            ": its tokenizer_class \"BertTokenizerFast\" is unknown; known are CLIPTokenizer, \
             Qwen2Tokenizer, T5Tokenizer, ByT5Tokenizer, TokenizersBackend, PreTrainedTokenizer, \
             LlamaTokenizer"
        );
        assert_eq!(
            said(&[class("LlamaTokenizer")]),
            ": its LlamaTokenizer is not one of bytes, as Mistral's is"
        );
        assert_eq!(said(&[class("PreTrainedTokenizerFast")]), ": holds no tokenizer.json");
        assert_eq!(said(&[class("CLIPTokenizer")]), ": holds no vocab.json");
        let vocab = ("vocab.json", json!({"a": 0, "b": 1}));
        assert_eq!(said(&[class("Qwen2Tokenizer"), vocab]), ": holds no merges.txt");
        assert_eq!(
            said(&[class("T5TokenizerFast")]),
            ": holds neither tokenizer.json nor spiece.model"
        );
        let model = ("spiece.model", json!("none"));
        assert!(
            said(&[class("T5Tokenizer"), model])
                .starts_with("/spiece.model: is no SentencePiece model: ")
        );
    }

    #[test]
    fn files_that_lie_are_refused() {
        let class = |name: &str| (CONFIG, json!({"tokenizer_class": name, "pad_token": "a"}));
        let pairs = |merges: &str| {
            [
                class("Qwen2Tokenizer"),
                ("vocab.json", json!({"a": 0, "b": 1})),
                ("merges.txt", json!(merges)),
            ]
        };
        assert_eq!(said(&pairs("a b")), ": \"a\" and \"b\" are joined to what is no token");
        assert_eq!(
            said(&pairs("#version: 0.2\na b c")),
            "/merges.txt: merge 1 is no pair, or one too many"
        );
        let written = |key: &str, value: Value| {
            let mut file = json!({"model": {"vocab": {"a": 0}, "merges": []}});
            file[key] = value;
            said(&[class("TokenizersBackend"), (FILE, file)])
        };
        for (key, value, what) in [
            ("model", json!({"vocab": {"a": 1 << 24}}), "16777216 is no id of a token"),
            ("model", json!({"vocab": {"a": 0}, "dropout": 0.5}), "drops merges by chance"),
            ("model", json!({"vocab": {"a": 0}, "unk_token": "b"}), "is not in the vocabulary"),
            ("model", json!({"vocab": [["a", 0.0]]}), "its model has no unk_id"),
            (
                "normalizer",
                json!({"type": "BertNormalizer"}),
                "\"BertNormalizer\" is not supported",
            ),
            (
                "normalizer",
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
                "precompiled_charsmap is broken",
            ),
            (
                "pre_tokenizer",
                json!({"type": "Sequence", "pretokenizers": vec![json!({}); 9]}),
                "8 allowed",
            ),
            ("post_processor", json!({"type": "TemplateProcessing"}), "template is broken"),
        ] {
            let text = written(key, value);
            assert!(text.starts_with("/tokenizer.json: ") && text.contains(what), "{text}");
        }
        let no_pad = json!({"model": {"vocab": {"a": 0}}});
        assert_eq!(said(&[(FILE, no_pad)]), ": names no pad_token");
        let long = (CONFIG, json!(" ".repeat((2 << 20) + 1)));
        assert_eq!(
            said(&[long]),
            "/tokenizer_config.json: is longer than the 2097152 bytes allowed"
        );
    }
}
