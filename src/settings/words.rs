//! Words of messages and listings: near names, quoted texts, numbers as people write them.

use crate::error::ConfigProblem;

/// A problem at a key. `place`: `line 12` or `--set`; empty where none is known.
pub(super) fn problem(key: &str, place: &str, what: String) -> ConfigProblem {
    ConfigProblem { key: key.into(), place: place.into(), what }
}

/// "unknown value `x`; did you mean `y`?", or the list of valid ones when nothing is near.
pub(super) fn not_among(what: &str, found: &str, valid: &[&str]) -> String {
    match nearest(found, valid.iter().copied()) {
        Some(near) => format!("unknown {what} `{found}`; did you mean `{near}`?"),
        None => format!("unknown {what} `{found}`; expected one of {}", valid.join(", ")),
    }
}

/// The valid name most like `found`: a few letters differ, or one of the two begins with the other.
pub fn nearest<'n>(found: &str, valid: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let scored = valid
        .filter(|name| is_near(found, name))
        .map(|name| (strsim::jaro_winkler(found, name), name));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}

/// Shortest name that is recognized as the beginning of another one.
const SHORTEST_BEGINNING: usize = 3;

/// One letter in five may differ: transposed and missing letters do, other words do not.
fn is_near(found: &str, name: &str) -> bool {
    let begins =
        |long: &str, short: &str| short.len() >= SHORTEST_BEGINNING && long.starts_with(short);
    strsim::osa_distance(found, name) <= found.chars().count().div_ceil(5)
        || begins(found, name)
        || begins(name, found)
}

/// The text as TOML has it, in quotes.
pub(super) fn quoted(text: &str) -> String {
    toml::Value::String(text.into()).to_string()
}

/// A key as TOML spells it: bare where it can be, in quotes otherwise.
pub fn key_text(name: &str) -> String {
    let is_bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(is_bare) { name.into() } else { quoted(name) }
}

/// `0.5`, `-1` and `1e-300`: the shortest of the ways to write a number.
pub(super) fn shown_number(value: f64) -> String {
    let [plain, scientific] = [format!("{value}"), format!("{value:e}")];
    if plain.len() <= scientific.len() + 3 { plain } else { scientific }
}

/// The path of `name` in the table at path `table`.
pub(super) fn joined(table: &str, name: &str) -> String {
    if table.is_empty() { name.into() } else { format!("{table}.{name}") }
}
