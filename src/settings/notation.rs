//! Recognizes texts in other notations than TOML.

/// Names the notation of a text that is no TOML, if it is JSON, YAML or a markup language.
pub(super) fn foreign(text: &str) -> Option<String> {
    let mut lines = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty() && !line.trim_start().starts_with('#'));
    let first = lines.next()?.trim_start();
    let notation = if first.starts_with('<') {
        "XML or HTML"
    } else if first.starts_with('{') {
        "JSON"
    } else if first == "---" || first.starts_with("%YAML") || is_yaml(first) {
        "YAML"
    } else {
        return None;
    };
    Some(format!(
        "is {notation}; a configuration is TOML: lines `key = value` under [tables], as `fm-dist config` prints them"
    ))
}

/// True for `key:` and `key: value`, with or without quotes, and for an item of a list.
fn is_yaml(line: &str) -> bool {
    let Some((key, rest)) = line.split_once(':') else { return line.starts_with("- ") };
    let plain =
        |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | ' ' | '"' | '\'');
    !key.is_empty() && key.chars().all(plain) && (rest.is_empty() || rest.starts_with(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_notations_are_told_from_toml() {
        for (text, notation) in [
            ("# run\nmodel:\n  path: x\n", "YAML"),
            ("---\nseed: 1\n", "YAML"),
            ("seed: 1", "YAML"),
            ("- a\n- b", "YAML"),
            ("\"seed\": 1", "YAML"),
            ("\n{\n  \"seed\": 1\n}", "JSON"),
            ("<!DOCTYPE html>", "XML or HTML"),
        ] {
            assert!(
                foreign(text).is_some_and(
                    |what| what.starts_with(&format!("is {notation}; a configuration is TOML"))
                ),
                "{text}"
            );
        }
        for text in ["seed = 1", "[train]", "seed = \"a: b\"", "", "# nothing", "seed 1", "a::b"] {
            assert_eq!(foreign(text), None, "{text}");
        }
    }
}
