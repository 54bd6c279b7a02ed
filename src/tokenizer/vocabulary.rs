//! `tokenizer.json`, `vocab.json` and `merges.txt`.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};

use super::folder::{Folder, MAX_VOCABULARY_BYTES};
use super::word::NumberedEntry;
use crate::error::{Error, Result};

pub const TOKENIZER_FILE_NAME: &str = "tokenizer.json";
pub const VOCABULARY_FILE_NAME: &str = "vocab.json";
pub const MERGES_FILE_NAME: &str = "merges.txt";

/// Most tokens and most merges, twice those of any published vocabulary.
pub const MAX_ENTRIES: usize = 1 << 19;
/// Most added tokens, thirty times those of any published tokenizer.
const MAX_ADDED: usize = 1 << 15;
/// Ids are below this number.
const END_OF_IDS: u32 = 1 << 24;

/// The parts of `tokenizer.json` that are used.
#[derive(Debug, Deserialize)]
pub struct TokenizerFile {
    #[serde(default)]
    added_tokens: Capped<NumberedEntry, MAX_ADDED>,
    pub normalizer: Option<Box<RawValue>>,
    pub pre_tokenizer: Option<Box<RawValue>>,
    pub post_processor: Option<Box<RawValue>>,
    pub padding: Option<Padding>,
    pub truncation: Option<Truncation>,
    pub model: Model,
}

impl TokenizerFile {
    /// # Errors
    /// Errors of [`Folder::json`].
    pub fn read(folder: Folder<'_>) -> Result<Option<Self>> {
        folder.json(TOKENIZER_FILE_NAME, MAX_VOCABULARY_BYTES)
    }

    /// True if texts are cut into bytes.
    pub fn is_of_bytes(&self) -> bool {
        self.pre_tokenizer.as_ref().is_some_and(|raw| raw.get().contains("\"ByteLevel\""))
    }

    /// Added tokens with the ids that they are said to have.
    pub fn added(&self) -> Vec<(u32, AddedToken)> {
        self.added_tokens.0.iter().map(NumberedEntry::numbered).collect()
    }
}

#[derive(Debug, Deserialize)]
pub struct Padding {
    pub direction: String,
    pub pad_token: String,
}

#[derive(Debug, Deserialize)]
pub struct Truncation {
    #[serde(default)]
    pub direction: String,
}

/// The model of `tokenizer.json`.
#[derive(Debug, Deserialize)]
pub struct Model {
    pub vocab: Tokens,
    #[serde(default)]
    merges: Capped<Merge, MAX_ENTRIES>,
    pub unk_id: Option<usize>,
    unk_token: Option<String>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    pub byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

impl Model {
    /// Vocabulary and merges, for classes that know the rest.
    ///
    /// # Errors
    /// A text, if the model is of scores instead.
    pub fn into_pairs(self) -> Result<Pairs, String> {
        match self.vocab {
            Tokens::Numbered(vocab) => Ok(Pairs { vocab, merges: self.merges.0 }),
            Tokens::Scored(_) => Err("its model is of scores, expected byte pairs".into()),
        }
    }

    /// The model as the file describes it.
    ///
    /// # Errors
    /// As [`into_pairs`](Self::into_pairs) and [`Pairs::build`]; a text about a rule that is not
    /// supported.
    pub fn into_bpe(self) -> Result<BPE, String> {
        let is_some = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if self.dropout.is_some_and(|dropout| dropout != 0.0) {
            return Err("its model drops merges by chance".into());
        }
        if is_some(&self.continuing_subword_prefix) {
            return Err("its model marks tokens within words, which is not supported".into());
        }
        let rules = Rules {
            unknown: self.unk_token.clone(),
            end_of_word: self.end_of_word_suffix.clone().unwrap_or_default(),
            fuse_unknown: self.fuse_unk,
            byte_fallback: self.byte_fallback,
            ignore_merges: self.ignore_merges,
        };
        self.into_pairs()?.build(rules)
    }
}

/// Rules of a byte-pair model.
#[derive(Debug, Default)]
pub struct Rules {
    pub unknown: Option<String>,
    pub end_of_word: String,
    pub fuse_unknown: bool,
    pub byte_fallback: bool,
    pub ignore_merges: bool,
}

/// Tokens with their ids, and the pairs that are joined, first ones first.
#[derive(Debug)]
pub struct Pairs {
    pub vocab: Vocab,
    pub merges: Vec<Merge>,
}

impl Pairs {
    /// Reads `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// [`Error::Data`] if one is missing or malformed.
    pub fn read(folder: Folder<'_>) -> Result<Self> {
        let missing = |name: &str| Error::data(folder.0, format!("holds no {name}"));
        let vocab: Option<Tokens> = folder.json(VOCABULARY_FILE_NAME, MAX_VOCABULARY_BYTES)?;
        let Some(Tokens::Numbered(vocab)) = vocab else {
            return Err(missing(VOCABULARY_FILE_NAME));
        };
        let text = folder
            .bytes(MERGES_FILE_NAME, MAX_VOCABULARY_BYTES)?
            .ok_or_else(|| missing(MERGES_FILE_NAME))?;
        let text = String::from_utf8(text).map_err(folder.error(MERGES_FILE_NAME))?;
        let lines = text.lines().filter(|line| !line.starts_with("#version"));
        let merge = |(index, line): (usize, &str)| {
            let merge = Merge::of(line).filter(|_| index < MAX_ENTRIES);
            merge.ok_or_else(|| format!("merge {} is no pair, or one too many", index + 1))
        };
        let merges: Result<Vec<Merge>, String> = lines.enumerate().map(merge).collect();
        Ok(Pairs { vocab, merges: merges.map_err(folder.error(MERGES_FILE_NAME))? })
    }

    /// # Errors
    /// A text that names a merge whose tokens are no tokens, or an unknown token that is none.
    pub fn build(self, rules: Rules) -> Result<BPE, String> {
        if let Some(token) = rules.unknown.as_ref().filter(|token| !self.vocab.contains_key(*token))
        {
            return Err(format!("the unknown token {token:?} is not in the vocabulary"));
        }
        let is_token = |text: &String| self.vocab.contains_key(text);
        let is_sound = |Merge(left, right): &&Merge| {
            is_token(left) && is_token(right) && is_token(&format!("{left}{right}"))
        };
        if let Some(Merge(left, right)) = self.merges.iter().find(|merge| !is_sound(merge)) {
            return Err(format!("{left:?} and {right:?} are joined to what is no token"));
        }
        let merges = self.merges.into_iter().map(|Merge(left, right)| (left, right)).collect();
        let builder = BPE::builder()
            .vocab_and_merges(self.vocab, merges)
            .end_of_word_suffix(rules.end_of_word)
            .fuse_unk(rules.fuse_unknown)
            .byte_fallback(rules.byte_fallback)
            .ignore_merges(rules.ignore_merges);
        let builder = match rules.unknown {
            Some(token) => builder.unk_token(token),
            None => builder,
        };
        builder.build().map_err(|error| error.to_string())
    }
}

/// Two tokens that are joined.
#[derive(Debug)]
pub struct Merge(pub String, pub String);

impl Merge {
    /// Two tokens with one space between them.
    fn of(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(' ')?;
        (!right.contains(' ')).then(|| Merge(left.into(), right.into()))
    }
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Merge, E> {
                Merge::of(text).ok_or_else(|| E::custom("a merge is no pair"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merge, A::Error> {
                let mut next = || list.next_element::<String>();
                match (next()?, next()?, next()?) {
                    (Some(left), Some(right), None) => Ok(Merge(left, right)),
                    _ => Err(A::Error::custom("a merge is no pair")),
                }
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

/// A vocabulary: ids by token, or tokens with scores in the order of their ids.
#[derive(Debug)]
pub enum Tokens {
    Numbered(Vocab),
    Scored(Vec<(String, f64)>),
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Tokens;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut table: A) -> Result<Tokens, A::Error> {
                let mut vocab = Vocab::default();
                while let Some((token, id)) = table.next_entry::<String, u32>()? {
                    if id >= END_OF_IDS {
                        return Err(A::Error::custom(format!("{id} is no id of a token")));
                    }
                    vocab.insert(token, id);
                    cap(vocab.len(), MAX_ENTRIES)?;
                }
                Ok(Tokens::Numbered(vocab))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Tokens, A::Error> {
                capped(list, MAX_ENTRIES).map(Tokens::Scored)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A list of at most `MOST` entries.
#[derive(Debug)]
struct Capped<T, const MOST: usize>(Vec<T>);

impl<T, const MOST: usize> Default for Capped<T, MOST> {
    fn default() -> Self {
        Capped(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Capped<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<T, const MOST: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for List<T, MOST> {
            type Value = Capped<T, MOST>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                capped(list, MOST).map(Capped)
            }
        }
        deserializer.deserialize_seq(List(PhantomData))
    }
}

fn capped<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut list: A,
    most: usize,
) -> Result<Vec<T>, A::Error> {
    let mut found = Vec::new();
    while let Some(entry) = list.next_element()? {
        found.push(entry);
        cap(found.len(), most)?;
    }
    Ok(found)
}

fn cap<E: serde::de::Error>(entries: usize, most: usize) -> Result<(), E> {
    match entries > most {
        true => Err(E::custom(format!("has more than the {most} entries allowed"))),
        false => Ok(()),
    }
}
