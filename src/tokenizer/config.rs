//! `tokenizer_config.json`, and `special_tokens_map.json` and `added_tokens.json` beside it, which
//! older versions of transformers wrote.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::folder::{Folder, MAX_CONFIG_BYTES};
use super::vocabulary::TokenizerFile;
use super::word::{Entry, Word};
use crate::error::Result;

pub const CONFIG_FILE_NAME: &str = "tokenizer_config.json";
const MAP_FILE_NAME: &str = "special_tokens_map.json";
const ADDED_FILE_NAME: &str = "added_tokens.json";

/// Special tokens that have a name, in the order in which a vocabulary gets them.
pub const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
const EXTRA: &str = "extra_special_tokens";
const ADDITIONAL: &str = "additional_special_tokens";

type Fields = Map<String, Value>;

/// What a folder says about a tokenizer beside its vocabulary.
#[derive(Debug, Default)]
pub struct Config {
    pub class: Option<String>,
    /// Named special tokens; a name with `None` says that there is no such token.
    named: BTreeMap<&'static str, Option<Word>>,
    /// Special tokens under names of one model's own.
    pub specific: Vec<Word>,
    /// Special tokens without names, under the key of today and under the one before.
    pub extra: Option<Vec<Word>>,
    pub additional: Option<Vec<Word>>,
    /// Added tokens by the id that they are said to have.
    pub added: BTreeMap<u32, AddedToken>,
    fields: Fields,
}

impl Config {
    /// `file`: the folder's `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Data`] for a file that cannot be read or has a value of an unexpected kind.
    pub fn read(folder: Folder<'_>, file: Option<&TokenizerFile>) -> Result<Self> {
        let fields: Fields = folder.json(CONFIG_FILE_NAME, MAX_CONFIG_BYTES)?.unwrap_or_default();
        let mut config = Config { fields, ..Config::default() };
        config.take_fields().map_err(folder.error(CONFIG_FILE_NAME))?;
        match config.fields.remove("added_tokens_decoder") {
            Some(added) => {
                config.added = decoder(&added).map_err(folder.error(CONFIG_FILE_NAME))?;
            }
            None => config.read_older_files(folder, file)?,
        }
        config.name_added_tokens();
        Ok(config)
    }

    /// Moves the special tokens out of the fields.
    fn take_fields(&mut self) -> Result<(), String> {
        self.class = match self.fields.remove("tokenizer_class") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        };
        if let Some(additional) = self.fields.get(ADDITIONAL).cloned()
            && self.fields.get(EXTRA).is_none_or(is_empty)
        {
            self.fields.remove(ADDITIONAL);
            self.fields.insert(EXTRA.into(), additional);
        }
        let (special, fields) = std::mem::take(&mut self.fields)
            .into_iter()
            .partition(|(name, value)| is_special(name, value));
        self.fields = fields;
        let special: Fields = special;
        special.iter().try_for_each(|(name, value)| self.take(name, value, Word::tagged))
    }

    /// Takes one entry of a table of special tokens. `word` reads a token.
    fn take(
        &mut self,
        name: &str,
        value: &Value,
        word: impl Fn(&Value) -> Option<Word>,
    ) -> Result<(), String> {
        let unexpected = || format!("{name} is no token: {value}");
        if name == ADDITIONAL {
            self.additional = Some(words(value).ok_or_else(unexpected)?);
        } else if name == EXTRA
            && let Value::Object(table) = value
        {
            let found = table.values().map(Word::tagged);
            self.specific.extend(found.collect::<Option<Vec<_>>>().ok_or_else(unexpected)?);
        } else if name == EXTRA {
            let list = words(value).ok_or_else(unexpected)?;
            let known = self.extra.get_or_insert_default();
            list.into_iter().for_each(|word| {
                if !known.contains(&word) {
                    known.push(word);
                }
            });
        } else if let Some(named) = NAMED.into_iter().find(|named| *named == name) {
            let found = match value {
                Value::Null => None,
                value => Some(word(value).ok_or_else(unexpected)?),
            };
            self.named.insert(named, found);
        } else if let Some(found) = word(value) {
            self.specific.push(found);
        }
        Ok(())
    }

    fn read_older_files(&mut self, folder: Folder<'_>, file: Option<&TokenizerFile>) -> Result<()> {
        let map: Fields = folder.json(MAP_FILE_NAME, MAX_CONFIG_BYTES)?.unwrap_or_default();
        for (name, value) in map.iter().filter(|(name, value)| is_special(name, value)) {
            self.take(name, value, mapped).map_err(folder.error(MAP_FILE_NAME))?;
        }
        let added: Option<BTreeMap<String, u32>> =
            folder.json(ADDED_FILE_NAME, MAX_CONFIG_BYTES)?;
        let named = self.named.values().flatten();
        let special: BTreeSet<String> =
            named.chain(self.extra.iter().flatten()).map(|word| word.text().into()).collect();
        for (text, id) in added.unwrap_or_default() {
            let is_special = special.contains(&text);
            self.added.insert(id, AddedToken::from(text, is_special));
        }
        for (id, token) in file.iter().flat_map(|file| file.added()) {
            self.added.insert(id, token);
        }
        Ok(())
    }

    /// Gives named tokens the rules of the added token with the same text.
    fn name_added_tokens(&mut self) {
        // Later ids win, as they do in a table that is filled in this order.
        let by_text: BTreeMap<&str, &AddedToken> =
            self.added.values().map(|token| (token.content.as_str(), token)).collect();
        for word in self.named.values_mut().flatten() {
            if let Some(token) = by_text.get(word.text()) {
                *word = Word::Token((*token).clone());
            }
        }
    }

    /// A named token; a folder that does not mention it leaves the class its own.
    pub fn named(&self, name: &'static str, otherwise: Option<&str>) -> Option<Word> {
        match self.named.get(name) {
            Some(word) => word.clone(),
            None => otherwise.map(|text| Word::Text(text.into())),
        }
    }

    /// Special tokens without names.
    pub fn unnamed(&self) -> &[Word] {
        self.extra.as_deref().or(self.additional.as_deref()).unwrap_or_default()
    }

    pub fn is_set(&self, name: &str) -> bool {
        self.fields.get(name).and_then(Value::as_bool) == Some(true)
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        self.fields.get(name).and_then(Value::as_u64)
    }

    /// True if a side is the left one; `otherwise` is what `tokenizer.json` says.
    pub fn is_left(&self, name: &str, otherwise: Option<&String>) -> bool {
        let side = self.fields.get(name).and_then(Value::as_str);
        side.or(otherwise.map(String::as_str)).is_some_and(|side| side.eq_ignore_ascii_case("left"))
    }
}

/// True for fields that hold special tokens; flags may have like names.
fn is_special(name: &str, value: &Value) -> bool {
    let is_word = value.is_string() || value.is_object();
    NAMED.contains(&name)
        || [EXTRA, ADDITIONAL].contains(&name)
        || name.ends_with("_token") && is_word
}

/// Values that Python counts as false.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(table) => table.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// A list of tokens; an absent one is empty.
fn words(value: &Value) -> Option<Vec<Word>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(list) => list.iter().map(Word::tagged).collect(),
        _ => None,
    }
}

/// A token of `special_tokens_map.json`, whose tables are special tokens.
fn mapped(value: &Value) -> Option<Word> {
    match value {
        Value::Object(_) => {
            let token = Entry::of(value).map(Entry::special)?.token();
            Some(Word::Token(token))
        }
        value => Word::tagged(value),
    }
}

/// Added tokens by id.
fn decoder(value: &Value) -> Result<BTreeMap<u32, AddedToken>, String> {
    let table = value.as_object().ok_or("added_tokens_decoder is no table")?;
    let token = |(id, value): (&String, &Value)| {
        let number: Option<u32> = id.parse().ok();
        let entry = Entry::of(value).map(Entry::token);
        number.zip(entry).ok_or_else(|| format!("added_tokens_decoder: {id} is no added token"))
    };
    table.iter().map(token).collect()
}
