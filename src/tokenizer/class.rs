//! The classes of tokenizers, and what each builds of a folder.
//!
//! Source: transformers 5.24.0, `tokenization_utils_tokenizers.py`.

use tokenizers::models::unigram::Unigram;
use tokenizers::{AddedToken, Tokenizer};

use super::config::{CONFIG_FILE_NAME, Config, NAMED};
use super::folder::Folder;
use super::vocabulary::{Pairs, TOKENIZER_FILE_NAME, TokenizerFile, Tokens};
use super::word::Word;
use super::written::{self, Affixes};
use super::{Model, bytes, clip, qwen2, t5};
use crate::error::{Error, Result};

/// The class that Mistral's folders name, whose tokenizers are of bytes; transformers then takes
/// `tokenizer.json` as it is written.
const LLAMA: &str = "LlamaTokenizer";

/// The classes of which published folders are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Class {
    Clip,
    Qwen2,
    T5,
    ByT5,
    /// All of `tokenizer.json`, as it is written.
    Written,
}

impl Class {
    /// Names of classes; each may also end in `Fast`.
    const NAMES: [(&'static str, Class); 7] = [
        ("CLIPTokenizer", Class::Clip),
        ("Qwen2Tokenizer", Class::Qwen2),
        ("T5Tokenizer", Class::T5),
        ("ByT5Tokenizer", Class::ByT5),
        ("TokenizersBackend", Class::Written),
        ("PreTrainedTokenizer", Class::Written),
        (LLAMA, Class::Written),
    ];

    /// The class that a folder names; without a name, that of a folder with `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Data`] if the class is unknown, or neither named nor to be told.
    pub fn of(folder: Folder<'_>, config: &Config, file: Option<&TokenizerFile>) -> Result<Self> {
        let Some(name) = &config.class else {
            let what = format!("holds no {CONFIG_FILE_NAME} that names its tokenizer_class");
            return file.map(|_| Class::Written).ok_or_else(|| Error::data(folder.0, what));
        };
        let plain = name.strip_suffix("Fast").unwrap_or(name);
        let found = Class::NAMES.iter().find(|(name, _)| *name == plain);
        let (_, class) = found.ok_or_else(|| Error::data(folder.0, unknown_class(name)))?;
        if plain == LLAMA && !file.is_some_and(TokenizerFile::is_of_bytes) {
            let what = format!("its {LLAMA} is not one of bytes, as Mistral's is");
            return Err(Error::data(folder.0, what));
        }
        Ok(*class)
    }

    /// Text of a named special token that a folder leaves to the class.
    pub fn named(self, name: &str) -> Option<&'static str> {
        match (self, name) {
            (Class::Clip, "bos_token") => Some("<|startoftext|>"),
            (Class::Clip | Class::Qwen2, "eos_token" | "unk_token" | "pad_token") => {
                Some("<|endoftext|>")
            }
            (Class::T5 | Class::ByT5, "eos_token") => Some("</s>"),
            (Class::T5 | Class::ByT5, "unk_token") => Some("<unk>"),
            (Class::T5 | Class::ByT5, "pad_token") => Some("<pad>"),
            _ => None,
        }
    }
}

fn unknown_class(name: &str) -> String {
    let names: Vec<&str> = Class::NAMES.iter().map(|(name, _)| *name).collect();
    format!("its tokenizer_class {name:?} is unknown; known are {}", names.join(", "))
}

/// A tokenizer, and the ids that it puts around those of a text.
pub struct Built {
    pub model: Model,
    pub affixes: Affixes,
}

/// # Errors
/// [`Error::Data`] for files that are missing, malformed or not supported.
pub fn build(
    class: Class,
    folder: Folder<'_>,
    config: &Config,
    file: Option<TokenizerFile>,
) -> Result<Built> {
    let place = match file {
        Some(_) => folder.path(TOKENIZER_FILE_NAME),
        None => folder.0.into(),
    };
    let built = match (class, file) {
        (Class::ByT5, _) => bytes::build(config),
        (Class::T5, Some(file)) => t5::build(config, file),
        (Class::T5, None) => return t5::of_model(folder, config),
        (Class::Clip, Some(file)) => {
            file.model.into_pairs().and_then(|pairs| clip::build(config, pairs))
        }
        (Class::Clip, None) => clip::build(config, Pairs::read(folder)?),
        (Class::Qwen2, Some(file)) => qwen2_of_file(config, file),
        (Class::Qwen2, None) => qwen2::build(config, Pairs::read(folder)?, None),
        (Class::Written, Some(file)) => as_written(config, file),
        (Class::Written, None) => Err(format!("holds no {TOKENIZER_FILE_NAME}")),
    };
    built.map_err(|what| Error::data(place, what))
}

fn qwen2_of_file(config: &Config, file: TokenizerFile) -> Result<Built, String> {
    let affixes = written::affixes(file.post_processor.as_deref())?;
    qwen2::build(config, file.model.into_pairs()?, Some(affixes))
}

/// All of `tokenizer.json`.
fn as_written(config: &Config, file: TokenizerFile) -> Result<Built, String> {
    let affixes = written::affixes(file.post_processor.as_deref())?;
    let normalizer = written::normalizer(file.normalizer.as_deref())?;
    let pre_tokenizer = written::pre_tokenizer(file.pre_tokenizer.as_deref())?;
    let added: Vec<AddedToken> = file.added().into_iter().map(|(_, token)| token).collect();
    let mut tokenizer = match file.model.vocab {
        Tokens::Numbered(_) => Tokenizer::new(file.model.into_bpe()?),
        Tokens::Scored(vocab) => {
            let unknown = file.model.unk_id.ok_or("its model has no unk_id")?;
            let model = Unigram::from(vocab, Some(unknown), file.model.byte_fallback);
            Tokenizer::new(model.map_err(told)?)
        }
    };
    tokenizer.with_normalizer(normalizer).map_err(told)?;
    tokenizer.with_pre_tokenizer(pre_tokenizer);
    tokenizer.add_tokens(added).map_err(told)?;
    add_tokens(&mut tokenizer, config, Class::Written, config.unnamed())?;
    Ok(Built { model: Model::learned(tokenizer), affixes })
}

/// Named special tokens, those of one model's own, and those without names, in the order in which
/// they are added.
pub fn special_words(config: &Config, class: Class, unnamed: &[Word]) -> Vec<Word> {
    let named = NAMED.iter().filter_map(|name| config.named(name, class.named(name)));
    named.chain(config.specific.iter().cloned()).chain(unnamed.iter().cloned()).collect()
}

/// Adds the tokens that the folder numbers, then special tokens that are not among them.
///
/// # Errors
/// A text of the crate.
pub fn add_tokens(
    tokenizer: &mut Tokenizer,
    config: &Config,
    class: Class,
    unnamed: &[Word],
) -> Result<(), String> {
    tokenizer.set_encode_special_tokens(config.is_set("split_special_tokens"));
    let words = special_words(config, class, unnamed);
    let mut tokens: Vec<AddedToken> = config.added.values().cloned().collect();
    let added = tokenizer.get_added_vocabulary().get_vocab();
    let is_known = |word: &Word| {
        added.contains_key(word.text())
            || config.added.values().any(|token| token.content == word.text())
    };
    tokens.extend(words.iter().filter(|word| !is_known(word)).map(Word::token));
    let named = &words[..words.len() - unnamed.len()];
    for token in &mut tokens {
        token.special |= named.iter().any(|word| word.text() == token.content);
    }
    tokenizer.add_tokens(tokens).map(drop).map_err(told)
}

/// The id of a token that a class needs.
///
/// # Errors
/// A text, if there is none.
pub fn id(tokenizer: &Tokenizer, word: Option<Word>, name: &str) -> Result<i64, String> {
    let id = word.and_then(|word| tokenizer.token_to_id(word.text()));
    id.map(i64::from).ok_or_else(|| format!("there is no {name}"))
}

/// What the crate says of a tokenizer that it does not take.
pub fn told(error: tokenizers::Error) -> String {
    error.to_string()
}
