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
//! | `folder` | files of a folder, within limits |
//! | `config` | `tokenizer_config.json` and the files that older versions wrote beside it |
//! | `word` | special and added tokens as those files describe them |
//! | `vocabulary` | `tokenizer.json`, `vocab.json` and `merges.txt` |
//! | `sentencepiece` | SentencePiece models |
//! | `charsmap` | the replacements that SentencePiece applies to a text first |
//! | `written` | normalizers, pre-tokenizers and post-processors as `tokenizer.json` describes them |
//! | `bytes` | ByT5's bytes |
//! | [`prompt`] | from prompts to the texts that are tokenized |
//!
//! Source: transformers 5.24.0, `tokenization_utils_tokenizers.py` and the classes' own files;
//! tokens are equal to its.

mod bytes;
mod charsmap;
mod class;
mod config;
mod folder;
mod sentencepiece;
mod vocabulary;
mod word;
mod written;

pub mod prompt;

use std::path::Path;

use crate::error::{Error, Result};

use bytes::ByteTokenizer;
use class::Class;
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
        let class = Class::of(folder, &config)?;
        let padding = file.as_ref().and_then(|file| file.padding.as_ref());
        let truncation = file.as_ref().and_then(|file| file.truncation.as_ref());
        let is_left = |name, otherwise: Option<&String>| {
            config
                .text(name)
                .or(otherwise.map(String::as_str))
                .is_some_and(|side| side == "left" || side == "Left")
        };
        let (pads_left, cuts_left) = (
            is_left("padding_side", padding.map(|padding| &padding.direction)),
            is_left("truncation_side", truncation.map(|truncation| &truncation.direction)),
        );
        let pad = class.named("pad_token").or(padding.map(|padding| padding.pad_token.as_str()));
        let pad = config.named("pad_token", pad);
        let pad = pad.ok_or_else(|| Error::data(folder.0, "names no pad_token"))?;
        let (model, affixes) = if class == Class::ByT5 {
            let model =
                ByteTokenizer::new(&config).map_err(folder.error(config::CONFIG_FILE_NAME))?;
            let end = config.named("eos_token", class.named("eos_token"));
            let after = end.and_then(|word| model.id(word.text())).into_iter().collect();
            (Model::Bytes(model), Affixes { before: Vec::new(), after })
        } else {
            let mut built = class::build(class, folder, &config, file)?;
            built.tokenizer.set_encode_special_tokens(config.is_set("split_special_tokens"));
            (Model::Learned(Box::new(built.tokenizer)), built.affixes)
        };
        let pad_id = model.id(pad.text());
        let pad_id = pad_id.ok_or_else(|| {
            Error::data(folder.0, format!("its pad_token {:?} is no token", pad.text()))
        })?;
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
