//! The tokenizer of Qwen2.5-VL and Qwen3: pairs of bytes.
//!
//! Source: transformers 5.24.0, `models/qwen2/tokenization_qwen2.py`.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::Model;
use super::class::{Built, Class, add_tokens, id, special_words, told};
use super::config::Config;
use super::vocabulary::{Pairs, Rules};
use super::written::Affixes;

/// Contractions, words, digits, signs, and white space.
const SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// `affixes`: those of `tokenizer.json`; without that file the configuration's flags say them.
///
/// # Errors
/// A text about a vocabulary without what the class needs.
pub fn build(config: &Config, pairs: Pairs, affixes: Option<Affixes>) -> Result<Built, String> {
    let mut tokenizer = Tokenizer::new(pairs.build(Rules::default())?);
    tokenizer.with_normalizer(Some(NFC)).map_err(told)?;
    let pattern = SplitPattern::Regex(SPLIT.into());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(told)?;
    let space = config.is_set("add_prefix_space");
    let bytes = ByteLevel::default().add_prefix_space(space).use_regex(false);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    add_tokens(&mut tokenizer, config, Class::Qwen2, config.unnamed())?;
    // The class adds its special tokens once more, without the rules that files give them.
    let words = special_words(config, Class::Qwen2, config.unnamed());
    let plain = words.iter().map(|word| AddedToken::from(word.text(), true));
    tokenizer.add_tokens(plain).map_err(told)?;
    let affixes = match affixes {
        Some(affixes) => affixes,
        None => Affixes {
            before: asked(&tokenizer, config, "add_bos_token", "bos_token")?,
            after: asked(&tokenizer, config, "add_eos_token", "eos_token")?,
        },
    };
    Ok(Built { model: Model::learned(tokenizer), affixes })
}

/// The id of a token that a flag puts around a text.
fn asked(
    tokenizer: &Tokenizer,
    config: &Config,
    flag: &str,
    name: &'static str,
) -> Result<Vec<i64>, String> {
    match config.named(name, Class::Qwen2.named(name)) {
        Some(word) if config.is_set(flag) => Ok(vec![id(tokenizer, Some(word), name)?]),
        _ => Ok(Vec::new()),
    }
}
