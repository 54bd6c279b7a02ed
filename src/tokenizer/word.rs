//! Special and added tokens as configurations describe them.

use serde::Deserialize;
use serde_json::Value;
use tokenizers::AddedToken;

/// A special token: its text alone, or with the rules by which it is found in a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Word {
    Text(String),
    Token(AddedToken),
}

impl Word {
    pub fn text(&self) -> &str {
        match self {
            Word::Text(text) => text,
            Word::Token(token) => &token.content,
        }
    }

    /// The token that is added to a vocabulary; a text alone becomes a special token.
    pub fn token(&self) -> AddedToken {
        match self {
            Word::Text(text) => AddedToken::from(text.as_str(), true),
            Word::Token(token) => token.clone(),
        }
    }

    /// Reads a text, or a table that says of itself that it is an added token; `None` of all else.
    pub fn tagged(value: &Value) -> Option<Self> {
        let is_tagged = || value.get("__type").is_some_and(|tag| tag == "AddedToken");
        match value {
            Value::String(text) => Some(Word::Text(text.clone())),
            Value::Object(_) if is_tagged() => Entry::of(value).map(Entry::token).map(Word::Token),
            _ => None,
        }
    }
}

/// An added token in a file.
#[derive(Clone, Debug, Deserialize)]
pub struct Entry {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Entry {
    pub fn of(value: &Value) -> Option<Self> {
        Entry::deserialize(value).ok()
    }

    /// The same token as a special one.
    pub fn special(self) -> Self {
        Entry { special: true, ..self }
    }

    pub fn token(self) -> AddedToken {
        AddedToken {
            content: self.content,
            single_word: self.single_word,
            lstrip: self.lstrip,
            rstrip: self.rstrip,
            normalized: self.normalized.unwrap_or(!self.special),
            special: self.special,
        }
    }
}

/// An added token with its id, as `tokenizer.json` lists them.
#[derive(Debug, Deserialize)]
pub struct NumberedEntry {
    pub id: u32,
    #[serde(flatten)]
    pub entry: Entry,
}

impl NumberedEntry {
    pub fn numbered(&self) -> (u32, AddedToken) {
        (self.id, self.entry.clone().token())
    }
}
