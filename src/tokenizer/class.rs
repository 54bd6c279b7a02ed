//! The classes of tokenizers, and what each builds of a folder.
//!
//! Source: transformers 5.24.0, `models/{clip,qwen2,t5}/tokenization_*.py` and
//! `tokenization_utils_tokenizers.py`.

use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::{self, Lowercase, NFC, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior};

use super::config::{Config, NAMED};
use super::folder::Folder;
use super::sentencepiece::{MODEL_FILE_NAMES, SentencePiece};
use super::vocabulary::{Pairs, Rules, TOKENIZER_FILE_NAME, TokenizerFile, Tokens};
use super::word::Word;
use super::written::{self, Affixes};
use crate::error::{Error, Result};

/// Splits at words, digits and contractions.
const CLIP_SPLIT: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Sentinels of T5 that a folder without a count has.
const EXTRA_IDS: u64 = 100;
const MOST_EXTRA_IDS: u64 = 1 << 12;
const SENTINEL: &str = "<extra_id_";
/// The id that T5's class gives to unknown characters.
const T5_UNKNOWN: usize = 2;

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
    const NAMES: [(&'static str, Class); 8] = [
        ("CLIPTokenizer", Class::Clip),
        ("Qwen2Tokenizer", Class::Qwen2),
        ("T5Tokenizer", Class::T5),
        ("ByT5Tokenizer", Class::ByT5),
        ("TokenizersBackend", Class::Written),
        ("PreTrainedTokenizer", Class::Written),
        ("PixtralTokenizer", Class::Written),
        ("LlamaTokenizer", Class::Written),
    ];

    /// The class that a folder names; without a name, that of a folder with `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Data`] if the class is unknown, or neither named nor to be told.
    pub fn of(folder: Folder<'_>, config: &Config) -> Result<Self> {
        let Some(name) = &config.class else {
            let written = folder.holds(TOKENIZER_FILE_NAME).then_some(Class::Written);
            return written.ok_or_else(|| Config::no_class(folder));
        };
        let plain = name.strip_suffix("Fast").unwrap_or(name);
        let found = Class::NAMES.iter().find(|(name, _)| *name == plain);
        found.map(|(_, class)| *class).ok_or_else(|| {
            let names: Vec<&str> = Class::NAMES.iter().map(|(name, _)| *name).collect();
            let what =
                format!("its tokenizer_class {name:?} is unknown; known are {}", names.join(", "));
            Error::data(folder.0, what)
        })
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

/// A tokenizer, and the ids that it puts around those of a text.
pub struct Built {
    pub tokenizer: tokenizers::Tokenizer,
    pub affixes: Affixes,
}

/// Builds all classes but ByT5's.
///
/// # Errors
/// [`Error::Data`] for files that are missing, malformed or not supported.
pub fn build(
    class: Class,
    folder: Folder<'_>,
    config: &Config,
    file: Option<TokenizerFile>,
) -> Result<Built> {
    let wrong = folder.error(TOKENIZER_FILE_NAME);
    match (class, file) {
        (Class::T5, file) => t5(folder, config, file),
        (Class::Written, Some(file)) => as_written(config, file).map_err(wrong),
        (Class::Written, None) => {
            Err(Error::data(folder.0, format!("holds no {TOKENIZER_FILE_NAME}")))
        }
        (_, Some(file)) => {
            let affixes = written::affixes(file.post_processor.as_deref());
            affixes
                .and_then(|affixes| byte_pairs(class, config, file.model.into_pairs()?, affixes))
                .map_err(wrong)
        }
        (_, None) => {
            let pairs = Pairs::read(folder)?;
            byte_pairs(class, config, pairs, Affixes::default())
                .and_then(|built| with_flags(built, config, class))
                .map_err(folder.error(""))
        }
    }
}

/// CLIP's and Qwen2's pairs of bytes.
fn byte_pairs(
    class: Class,
    config: &Config,
    pairs: Pairs,
    affixes: Affixes,
) -> Result<Built, String> {
    let named = |name| config.named(name, class.named(name));
    let is_clip = class == Class::Clip;
    let rules = Rules {
        unknown: named("unk_token").filter(|_| is_clip).map(|word| word.text().into()),
        end_of_word: if is_clip { "</w>".into() } else { String::new() },
        ..Rules::default()
    };
    let mut tokenizer = tokenizers::Tokenizer::new(pairs.build(rules)?);
    let (normalizer, pattern, behavior): (NormalizerWrapper, _, _) = if is_clip {
        (clip_normalizer()?, CLIP_SPLIT, SplitDelimiterBehavior::Removed)
    } else {
        (NFC.into(), QWEN2_SPLIT, SplitDelimiterBehavior::Isolated)
    };
    tokenizer.with_normalizer(Some(normalizer)).map_err(told)?;
    let split = Split::new(SplitPattern::Regex(pattern.into()), behavior, is_clip).map_err(told)?;
    let space = !is_clip && config.is_set("add_prefix_space");
    let bytes = ByteLevel::default().add_prefix_space(space).use_regex(is_clip);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    add_tokens(
        &mut tokenizer,
        config,
        class,
        config.extra.as_ref().or(config.additional.as_ref()),
    )?;
    if !is_clip {
        // Qwen2's class adds its special tokens once more, without the rules that files give them.
        let plain = special_words(config, class, config.extra.as_deref().unwrap_or_default());
        let plain = plain.iter().map(|word| AddedToken::from(word.text(), true));
        tokenizer.add_tokens(plain).map_err(told)?;
    }
    let affixes = match is_clip {
        true => Affixes {
            before: vec![id(&tokenizer, named("bos_token"), "bos_token")?],
            after: vec![id(&tokenizer, named("eos_token"), "eos_token")?],
        },
        false => affixes,
    };
    Ok(Built { tokenizer, affixes })
}

fn clip_normalizer() -> Result<NormalizerWrapper, String> {
    let space = normalizers::replace::ReplacePattern::Regex(r"\s+".into());
    let space = Replace::new(space, " ").map_err(told)?;
    Ok(normalizers::Sequence::new(vec![NFC.into(), space.into(), Lowercase.into()]).into())
}

/// Start and end tokens, where a folder without `tokenizer.json` asks for them.
fn with_flags(built: Built, config: &Config, class: Class) -> Result<Built, String> {
    if class == Class::Clip {
        return Ok(built);
    }
    let asked = |flag, name| match config.named(name, class.named(name)) {
        Some(word) if config.is_set(flag) => {
            id(&built.tokenizer, Some(word), name).map(|id| vec![id])
        }
        _ => Ok(Vec::new()),
    };
    let affixes = Affixes {
        before: asked("add_bos_token", "bos_token")?,
        after: asked("add_eos_token", "eos_token")?,
    };
    Ok(Built { affixes, ..built })
}

fn t5(folder: Folder<'_>, config: &Config, file: Option<TokenizerFile>) -> Result<Built> {
    let Some(file) = file else {
        let Some((model, name)) = SentencePiece::read(folder)? else {
            let what = format!("holds neither {TOKENIZER_FILE_NAME} nor {}", MODEL_FILE_NAMES[0]);
            return Err(Error::data(folder.0, what));
        };
        return t5_of_model(config, &model).map_err(folder.error(name));
    };
    let wrong = folder.error(TOKENIZER_FILE_NAME);
    let built = || {
        let Tokens::Scored(vocab) = file.model.vocab else {
            return Err("its model is of byte pairs, expected scores".into());
        };
        let map = written::replacements(file.normalizer.as_deref())?;
        unigram(config, vocab, map.as_deref(), config.additional.clone())
    };
    built().map_err(wrong)
}

fn t5_of_model(config: &Config, model: &SentencePiece) -> Result<Built, String> {
    if !model.is_unigram() {
        return Err("is a model of byte pairs, expected scores".into());
    }
    let mut vocab = model.scored();
    vocab.extend(sentinels(config).rev().map(|text| (text, 0.0)));
    let added =
        |(text, special)| Word::Token(AddedToken { special, ..AddedToken::from(text, true) });
    let additional = model.added().into_iter().map(added).collect();
    unigram(config, vocab, model.replacements(), Some(additional))
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
    let model = Unigram::from(vocab, Some(T5_UNKNOWN), false).map_err(told)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    if let Some(map) = map {
        let replacements: NormalizerWrapper = super::charsmap::precompiled(map)?.into();
        tokenizer.with_normalizer(Some(replacements)).map_err(told)?;
    }
    let words = Metaspace::new('▁', PrependScheme::Always, true);
    let parts = vec![WhitespaceSplit.into(), words.into()];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(parts)));
    let extra = match &config.extra {
        Some(extra) => extra.clone(),
        None => with_sentinels(config, additional),
    };
    add_tokens(&mut tokenizer, config, Class::T5, Some(&extra))?;
    let end = config.named("eos_token", Class::T5.named("eos_token"));
    let after = vec![id(&tokenizer, end, "eos_token")?];
    Ok(Built { tokenizer, affixes: Affixes { before: Vec::new(), after } })
}

/// Special tokens, and the sentinels unless some are among them.
fn with_sentinels(config: &Config, additional: Option<Vec<Word>>) -> Vec<Word> {
    let mut words = additional.unwrap_or_default();
    if !words.iter().any(|word| word.text().contains(SENTINEL)) {
        words.extend(sentinels(config).map(Word::Text));
    }
    words
}

fn as_written(config: &Config, file: TokenizerFile) -> Result<Built, String> {
    let affixes = written::affixes(file.post_processor.as_deref())?;
    let normalizer = written::normalizer(file.normalizer.as_deref())?;
    let pre_tokenizer = written::pre_tokenizer(file.pre_tokenizer.as_deref())?;
    let added: Vec<AddedToken> = file.added().into_iter().map(|(_, token)| token).collect();
    let mut tokenizer = match file.model.vocab {
        Tokens::Numbered(_) => tokenizers::Tokenizer::new(file.model.into_bpe()?),
        Tokens::Scored(vocab) => {
            let unknown = file.model.unk_id.ok_or("its model has no unk_id")?;
            let model = Unigram::from(vocab, Some(unknown), file.model.byte_fallback);
            tokenizers::Tokenizer::new(model.map_err(told)?)
        }
    };
    tokenizer.with_normalizer(normalizer).map_err(told)?;
    tokenizer.with_pre_tokenizer(pre_tokenizer);
    tokenizer.add_tokens(added).map_err(told)?;
    let extra = config.extra.as_ref().or(config.additional.as_ref());
    add_tokens(&mut tokenizer, config, Class::Written, extra)?;
    Ok(Built { tokenizer, affixes })
}

/// Named special tokens, those of one model's own, and those without names, in the order in which
/// they are added.
fn special_words(config: &Config, class: Class, extra: &[Word]) -> Vec<Word> {
    let named = NAMED.iter().filter_map(|name| config.named(name, class.named(name)));
    named.chain(config.specific.iter().cloned()).chain(extra.iter().cloned()).collect()
}

/// Adds the tokens that the folder numbers, then special tokens that are not among them.
fn add_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    config: &Config,
    class: Class,
    extra: Option<&Vec<Word>>,
) -> Result<(), String> {
    let words = special_words(config, class, extra.map(Vec::as_slice).unwrap_or_default());
    let mut tokens: Vec<AddedToken> = config.added.values().cloned().collect();
    let added = tokenizer.get_added_vocabulary().get_vocab();
    let is_known = |word: &Word| {
        added.contains_key(word.text())
            || config.added.values().any(|token| token.content == word.text())
    };
    tokens.extend(words.iter().filter(|word| !is_known(word)).map(Word::token));
    let count = words.len() - extra.map(Vec::len).unwrap_or_default();
    for token in &mut tokens {
        token.special |= words[..count].iter().any(|word| word.text() == token.content);
    }
    tokenizer.add_tokens(tokens).map(drop).map_err(told)
}

/// The id of a token that a class needs.
fn id(tokenizer: &tokenizers::Tokenizer, word: Option<Word>, name: &str) -> Result<i64, String> {
    let id = word.and_then(|word| tokenizer.token_to_id(word.text()));
    id.map(i64::from).ok_or_else(|| format!("there is no {name}"))
}

fn told(error: tokenizers::Error) -> String {
    error.to_string()
}
