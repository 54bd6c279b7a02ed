//! CLIP's tokenizer: pairs of bytes in words, of which the last one is marked.
//!
//! Source: transformers 5.24.0, `models/clip/tokenization_clip.py`.

use tokenizers::normalizers::{self, Lowercase, NFC, NormalizerWrapper, Replace, replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::Model;
use super::class::{Built, Class, add_tokens, id, told};
use super::config::Config;
use super::vocabulary::{Pairs, Rules};
use super::written::Affixes;

/// Special tokens, contractions, words, digits, and signs.
const SPLIT: &str = concat!(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d",
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
);

/// # Errors
/// A text about a vocabulary without what the class needs.
pub fn build(config: &Config, pairs: Pairs) -> Result<Built, String> {
    let named = |name| config.named(name, Class::Clip.named(name));
    let rules = Rules {
        unknown: named("unk_token").map(|word| word.text().into()),
        end_of_word: "</w>".into(),
        ..Rules::default()
    };
    let mut tokenizer = Tokenizer::new(pairs.build(rules)?);
    tokenizer.with_normalizer(Some(normalizer()?)).map_err(told)?;
    let pattern = SplitPattern::Regex(SPLIT.into());
    let split = Split::new(pattern, SplitDelimiterBehavior::Removed, true).map_err(told)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    add_tokens(&mut tokenizer, config, Class::Clip, config.unnamed())?;
    let affixes = Affixes {
        before: vec![id(&tokenizer, named("bos_token"), "bos_token")?],
        after: vec![id(&tokenizer, named("eos_token"), "eos_token")?],
    };
    Ok(Built { model: Model::learned(tokenizer), affixes })
}

fn normalizer() -> Result<NormalizerWrapper, String> {
    let space = replace::ReplacePattern::Regex(r"\s+".into());
    let space = Replace::new(space, " ").map_err(told)?;
    Ok(normalizers::Sequence::new(vec![NFC.into(), space.into(), Lowercase.into()]).into())
}
