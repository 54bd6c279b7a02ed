//! Character references of HTML, resolved as Python's `html.unescape` does.
//!
//! Source: CPython 3.11, `Lib/html/__init__.py`; the names are those of the HTML standard.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use entities::ENTITIES;
use regex::{Captures, Regex};

/// A number, or a name of at most 32 characters.
static REFERENCE: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r"&(?:#([0-9]+);?|#[xX]([0-9a-fA-F]+);?|([^\t\n\f <&#;]{1,32};?))";
    Regex::new(pattern).expect("a sound pattern")
});

/// Characters by name; names that may stand without a semicolon are there in both forms.
static NAMED: LazyLock<BTreeMap<&str, &str>> = LazyLock::new(|| {
    ENTITIES.iter().map(|entity| (&entity.entity[1..], entity.characters)).collect()
});

/// Characters of Windows-1252 from 128 on, which old pages mean by these numbers.
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}',
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

pub fn unescape(text: &str) -> Cow<'_, str> {
    REFERENCE.replace_all(text, resolved)
}

fn resolved(found: &Captures<'_>) -> String {
    let number = |group, radix| {
        let digits = found.get(group)?.as_str();
        // Numbers too long for the type are no characters either.
        Some(u32::from_str_radix(digits, radix).unwrap_or(u32::MAX))
    };
    match number(1, 10).or_else(|| number(2, 16)) {
        Some(number) => numbered(number),
        None => named(&found[3]),
    }
}

fn numbered(number: u32) -> String {
    let is_nothing = matches!(number,
        0x1..=0x8 | 0xb | 0xe..=0x1f | 0x7f | 0xfdd0..=0xfdef)
        || number <= 0x10_ffff && number & 0xfffe == 0xfffe;
    match (number, char::from_u32(number)) {
        (0x80..=0x9f, _) => WINDOWS_1252[number as usize - 0x80].to_string(),
        (0, _) | (_, None) => char::REPLACEMENT_CHARACTER.to_string(),
        _ if is_nothing => String::new(),
        (_, Some(c)) => c.to_string(),
    }
}

/// The characters of a name, or of the longest name that it begins with.
fn named(name: &str) -> String {
    if let Some(found) = NAMED.get(name) {
        return (*found).to_string();
    }
    let ends: Vec<usize> = name.char_indices().map(|(at, _)| at).skip(2).collect();
    let longest = ends.iter().rev().find_map(|end| {
        let (name, rest) = name.split_at(*end);
        NAMED.get(name).map(|found| format!("{found}{rest}"))
    });
    longest.unwrap_or_else(|| format!("&{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_become_characters() {
        let pairs = [
            ("&lt;&GT;&gt", "<>>"),
            ("&notin; &notit; &not", "∉ ¬it; ¬"),
            ("&#65;&#x42&#0;&#128;&#13;", "AB\u{fffd}€\r"),
            ("&#xd800;&#99999999999;&#x1;&#xfffe;", "\u{fffd}\u{fffd}"),
            ("& &; &x; &#; &#x; &é", "& &; &x; &#; &#x; &é"),
            ("&amp;lt;", "&lt;"),
            ("&bne;", "=\u{20e5}"),
        ];
        for (text, expected) in pairs {
            assert_eq!(unescape(text), expected, "{text}");
        }
    }
}
