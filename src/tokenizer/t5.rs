//! The tokenizer of T5 and UMT5: tokens with scores, of which the best ones are taken together.
//!
//! Of `tokenizer.json` the class takes vocabulary and replacements. It says itself that unknown
//! characters are token 2, also where the file spells them in bytes, as UMT5's may.
//!
//! Source: transformers 5.24.0, `models/t5/tokenization_t5.py` and `convert_slow_tokenizer.py`.

use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, Tokenizer};

use super::Model;
use super::charsmap;
use super::class::{Built, Class, add_tokens, id, told};
use super::config::Config;
use super::folder::Folder;
use super::sentencepiece::{MODEL_FILE_NAMES, SentencePiece};
use super::vocabulary::{TOKENIZER_FILE_NAME, TokenizerFile, Tokens};
use super::word::Word;
use super::written::{self, Affixes};
use crate::error::{Error, Result};

/// Sentinels that a folder without a count has.
const EXTRA_IDS: u64 = 100;
const MOST_EXTRA_IDS: u64 = 1 << 12;
const SENTINEL: &str = "<extra_id_";
/// The id of unknown characters.
const UNKNOWN: usize = 2;

/// # Errors
/// A text about a file without what the class needs.
pub fn build(config: &Config, file: TokenizerFile) -> Result<Built, String> {
    let Tokens::Scored(vocab) = file.model.vocab else {
        return Err("its model is of byte pairs, expected scores".into());
    };
    let map = written::replacements(file.normalizer.as_deref())?;
    unigram(config, vocab, map.as_deref(), config.additional.clone())
}

/// Builds of a SentencePiece model.
///
/// # Errors
/// [`Error::Data`] for a model that is missing, malformed or not supported.
pub fn of_model(folder: Folder<'_>, config: &Config) -> Result<Built> {
    let Some((model, name)) = SentencePiece::read(folder)? else {
        let what = format!("holds neither {TOKENIZER_FILE_NAME} nor {}", MODEL_FILE_NAMES[0]);
        return Err(Error::data(folder.0, what));
    };
    let wrong = folder.error(name);
    if !model.is_unigram() {
        return Err(wrong("is a model of byte pairs, expected scores".to_string()));
    }
    let mut vocab = model.scored();
    vocab.extend(sentinels(config).rev().map(|text| (text, 0.0)));
    let word = |(text, special)| {
        Word::Token(AddedToken { special, ..AddedToken::from::<String>(text, true) })
    };
    let additional = model.added().into_iter().map(word).collect();
    unigram(config, vocab, model.replacements(), Some(additional)).map_err(wrong)
}

/// Names of T5's sentinels.
fn sentinels(config: &Config) -> impl DoubleEndedIterator<Item = String> + use<> {
    let count = config.number("extra_ids").unwrap_or(EXTRA_IDS).min(MOST_EXTRA_IDS);
    (0..count).map(|id| format!("{SENTINEL}{id}>"))
}

fn unigram(
    config: &Config,
    vocab: Vec<(String, f64)>,
    map: Option<&[u8]>,
    additional: Option<Vec<Word>>,
) -> Result<Built, String> {
    let model = Unigram::from(vocab, Some(UNKNOWN), false).map_err(told)?;
    let mut tokenizer = Tokenizer::new(model);
    if let Some(map) = map {
        let replacements: NormalizerWrapper = charsmap::precompiled(map)?.into();
        tokenizer.with_normalizer(Some(replacements)).map_err(told)?;
    }
    let words = Metaspace::new('▁', PrependScheme::Always, true);
    let parts = vec![WhitespaceSplit.into(), words.into()];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(parts)));
    let extra = match &config.extra {
        Some(extra) => extra.clone(),
        None => with_sentinels(config, additional),
    };
    add_tokens(&mut tokenizer, config, Class::T5, &extra)?;
    let end = config.named("eos_token", Class::T5.named("eos_token"));
    let after = vec![id(&tokenizer, end, "eos_token")?];
    let affixes = Affixes { before: Vec::new(), after };
    Ok(Built { model: Model::learned(tokenizer), affixes })
}

/// Special tokens, and the sentinels unless some are among them.
fn with_sentinels(config: &Config, additional: Option<Vec<Word>>) -> Vec<Word> {
    let mut words = additional.unwrap_or_default();
    if !words.iter().any(|word| word.text().contains(SENTINEL)) {
        words.extend(sentinels(config).map(Word::Text));
    }
    words
}
