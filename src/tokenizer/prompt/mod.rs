//! From a user's prompt to the texts that each family's pipeline tokenizes.
//!
//! | family | text |
//! |---|---|
//! | FLUX.1 | the prompt itself, for both tokenizers |
//! | FLUX.2 dev, FLUX.2 klein | [`flux2_dev`], [`flux2_klein`] |
//! | Qwen-Image | [`qwen_image`] |
//! | HunyuanVideo 1.5 | [`hunyuan_video15`]; [`quoted_texts`] for ByT5 |
//! | Wan | [`wan`] |
//!
//! Source: diffusers 0.42.1, `pipelines`, and the chat templates of the published folders.

mod html;
mod templates;

use std::sync::LazyLock;

use regex::Regex;

pub use templates::{Templated, flux2_dev, flux2_klein, hunyuan_video15, qwen_image};

use super::Tokenizer;

/// Text between quotation marks of either kind, on one line.
static QUOTED: LazyLock<Regex> =
    LazyLock::new(|| Regex::new("\"(.*?)\"|“(.*?)”").expect("a sound pattern"));

/// Returns the text that Wan's tokenizer reads: character references resolved, twice, and white
/// space joined to single spaces.
///
/// diffusers also repairs wrongly decoded text by `ftfy` where that package is installed, which is
/// not done here: without it the texts are equal.
pub fn wan(prompt: &str) -> String {
    let once = html::unescape(prompt);
    let twice = html::unescape(&once);
    // Separators of ASCII are white space at the ends alone, where other rules hold than inside.
    let words: Vec<&str> = twice.trim_matches(is_space).split_whitespace().collect();
    words.join(" ")
}

/// Returns the text that HunyuanVideo 1.5's ByT5 reads: what stands between quotation marks, each
/// text once. `None` if the prompt quotes nothing; then its embeddings and their mask are zeros,
/// and no encoder is run.
pub fn quoted_texts(prompt: &str) -> Option<String> {
    let mut texts: Vec<&str> = Vec::new();
    for found in QUOTED.captures_iter(prompt) {
        let text = found.get(1).or(found.get(2)).map_or("", |text| text.as_str());
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    let said: Vec<String> = texts.iter().map(|text| format!("Text \"{text}\". ")).collect();
    (!said.is_empty()).then(|| said.concat())
}

/// True for characters that Python's `str.strip` removes.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wans_prompts_are_cleaned() {
        assert_eq!(wan("\u{1c} a\u{1f}b \n\tc \u{1f}"), "a\u{1f}b c");
        assert_eq!(wan("R&amp;amp;D &lt;tag&gt;&nbsp;&#39;x&#x27;"), "R&D <tag> 'x'");
        assert_eq!(wan(""), "");
        assert_eq!(wan("&nbsp;"), "");
    }

    #[test]
    fn quoted_texts_are_told_once() {
        assert_eq!(quoted_texts("a cat"), None);
        assert_eq!(quoted_texts("\"open"), None);
        assert_eq!(quoted_texts("\"a\nb\""), None);
        assert_eq!(
            quoted_texts("says \"Hi\", “您好” and \"Hi\"").as_deref(),
            Some("Text \"Hi\". Text \"您好\". ")
        );
        assert_eq!(quoted_texts("\"\"").as_deref(), Some("Text \"\". "));
    }
}
