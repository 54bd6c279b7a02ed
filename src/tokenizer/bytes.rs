//! ByT5's tokens: a byte of UTF-8 has its number plus three as its id. Added tokens are found
//! first.
//!
//! Source: transformers 5.24.0, `models/byt5/tokenization_byt5.py` and `tokenization_python.py`.

use std::collections::BTreeMap;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::AddedToken;

use super::Model;
use super::class::{Built, Class};
use super::config::{Config, NAMED};
use super::prompt::is_space;
use super::word::Word;
use super::written::Affixes;

/// Tokens before the bytes.
const FIRST: [&str; 3] = ["pad_token", "eos_token", "unk_token"];
const OFFSET: u32 = FIRST.len() as u32;
const BYTES: u32 = 256;
/// Special tokens that a folder without a list of its own has.
const EXTRA_IDS: u64 = 125;

#[derive(Debug)]
pub struct ByteTokenizer {
    added: Vec<(AddedToken, u32)>,
    search: AhoCorasick,
}

/// A stretch of a text.
enum Piece<'t> {
    Text(&'t str),
    /// An index of an added token.
    Added(usize),
}

/// # Errors
/// A text about a token that is not supported.
pub fn build(config: &Config) -> Result<Built, String> {
    let tokenizer = ByteTokenizer::new(config)?;
    let end = config.named("eos_token", Class::ByT5.named("eos_token"));
    let after = end.and_then(|word| tokenizer.id(word.text())).into_iter().collect();
    let affixes = Affixes { before: Vec::new(), after };
    Ok(Built { model: Model::Bytes(tokenizer), affixes })
}

impl ByteTokenizer {
    fn new(config: &Config) -> Result<Self, String> {
        let mut added = numbered(config);
        added.retain(|(token, _)| !token.content.is_empty());
        if let Some((token, _)) = added.iter().find(|(token, _)| token.single_word) {
            return Err(format!(
                "token {:?} is a single word, which is not supported",
                token.content
            ));
        }
        let texts = added.iter().map(|(token, _)| &token.content);
        let search = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts);
        Ok(ByteTokenizer { search: search.map_err(|error| error.to_string())?, added })
    }

    pub fn id(&self, text: &str) -> Option<i64> {
        let found = self.added.iter().find(|(token, _)| token.content == text);
        found.map(|(_, id)| i64::from(*id))
    }

    pub fn ids(&self, text: &str) -> Vec<i64> {
        let mut pieces = self.pieces(text);
        for index in 0..pieces.len() {
            let Piece::Added(added) = pieces[index] else { continue };
            let token = &self.added[added].0;
            if token.rstrip
                && let Some(Piece::Text(text)) = pieces.get_mut(index + 1)
            {
                *text = text.trim_start_matches(is_space);
            }
            if token.lstrip
                && let Some(Piece::Text(text)) = pieces[..index].last_mut()
            {
                *text = text.trim_end_matches(is_space);
            }
        }
        let ids = |piece: Piece<'_>| match piece {
            Piece::Added(added) => vec![i64::from(self.added[added].1)],
            Piece::Text(text) => {
                text.bytes().map(|byte| i64::from(byte) + i64::from(OFFSET)).collect()
            }
        };
        pieces.into_iter().flat_map(ids).collect()
    }

    fn pieces<'t>(&self, text: &'t str) -> Vec<Piece<'t>> {
        let mut pieces = Vec::new();
        let mut from = 0;
        for found in self.search.find_iter(text) {
            pieces.push(Piece::Text(&text[from..found.start()]));
            pieces.push(Piece::Added(found.pattern().as_usize()));
            from = found.end();
        }
        pieces.push(Piece::Text(&text[from..]));
        pieces
    }
}

/// Added tokens with their ids: the first three, those that the folder numbers, and special tokens
/// behind them.
fn numbered(config: &Config) -> Vec<(AddedToken, u32)> {
    let named = |name| config.named(name, Class::ByT5.named(name));
    let first = FIRST.into_iter().map(named).zip(0..).filter_map(|(word, id)| {
        let token = match word? {
            Word::Text(text) => AddedToken::from(text, true).lstrip(true).rstrip(true),
            Word::Token(token) => token,
        };
        Some((id, token))
    });
    let mut added: BTreeMap<u32, AddedToken> = first.collect();
    added.extend(config.added.clone());
    let within = added.range(OFFSET..OFFSET + BYTES).count();
    let mut next = (BYTES as usize - within + added.len()) as u32;
    for word in NAMED.into_iter().filter_map(named).chain(unnamed(config)) {
        if !added.values().any(|token| token.content == word.text()) {
            added.insert(next, word.token());
            next += 1;
        }
    }
    added.into_iter().map(|(id, token)| (token, id)).collect()
}

/// Special tokens without names; a folder that says nothing of them has the class's sentinels.
fn unnamed(config: &Config) -> Vec<Word> {
    if config.extra.is_some() || config.additional.is_some() {
        return config.unnamed().to_vec();
    }
    let count = config.number("extra_ids").unwrap_or(EXTRA_IDS).min(u64::from(BYTES));
    (0..count).map(|id| Word::Text(format!("<extra_id_{id}>"))).collect()
}
