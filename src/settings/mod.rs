//! One description of a room's settings that reads them, checks them and prints them.
//!
//! A struct of settings is one table, `settings!`, with one entry a setting: meaning, name, type,
//! default, range. Reading TOML into it (strict, every problem at once, with line and nearest valid
//! name) and writing the annotated listing both walk that table, so that the two cannot drift
//! apart.
//!
//! | file | holds |
//! |---|---|
//! | `table` | `settings!`, the table itself |
//! | `choice` | `choice!`, a value that is one of a few words |
//! | `value`, `several` | the types of a key: numbers, texts, lists, maps from patterns |
//! | `limits` | ranges of numbers |
//! | `keys` | the ways in which a field can stand in a document |
//! | `tree` | TOML, `--set` and JSON as one tree that remembers lines |
//! | `read`, `hints` | a document into settings; what was meant by an unknown key |
//! | `write` | settings as a listing |
//! | `words`, `notation` | words of messages; texts that are no TOML |

mod choice;
mod hints;
mod keys;
mod limits;
mod notation;
mod read;
mod several;
mod table;
mod tree;
mod value;
mod words;
mod write;

pub(crate) use choice::choice;
pub(crate) use keys::{unlimited, within};
pub(crate) use table::{first_paragraph, settings};
pub(crate) use value::parsed;
pub(crate) use words::nearest;

pub use choice::Choice;
pub use hints::Habit;
pub use keys::{Family, Field, Key, Keys, Members, Named, Settings, Tables};
pub use limits::{Limits, above, above_up_to};
pub use several::{GlobMap, one_or_several};
pub use tree::{Content, Node};
pub use value::{Misfit, Scalar, Value};
pub use words::key_text;

use crate::error::{ConfigProblem, Error, Result};
use hints::Guide;
use read::Findings;
use write::Listing;

/// Longest configuration of a user that is read, overrides included: three times the complete
/// listing, and the parser takes a thousand times as much memory.
const MAX_BYTES: usize = 48 << 10;

/// Reads `settings` from TOML text and `--set key.path=value` overrides on top of its present
/// values.
///
/// # Errors
/// [`Error::Config`] with every problem found: too long, syntax, unknown key, wrong type, out of
/// range, duplicate.
pub fn read(
    settings: &mut dyn Settings,
    source_name: &str,
    text: &str,
    overrides: &[String],
) -> Result<()> {
    read_with_habits(settings, &[], source_name, text, overrides)
}

/// As [`read`]; an unknown key that other programs have is told by `habits`, before the nearest
/// name is guessed.
///
/// # Errors
/// As [`read`].
pub fn read_with_habits(
    settings: &mut dyn Settings,
    habits: &[Habit],
    source_name: &str,
    text: &str,
    overrides: &[String],
) -> Result<()> {
    let bytes = text.len() + overrides.iter().map(String::len).sum::<usize>();
    if bytes > MAX_BYTES {
        let what = format!(
            "is {bytes} bytes long with its overrides, longer than the {MAX_BYTES} allowed"
        );
        return Err(Error::Config {
            source_name: source_name.into(),
            problems: vec![words::problem("text", "", what)],
        });
    }
    read_any(settings, habits, source_name, text, overrides)
}

/// Reads `settings` from a listing that [`write()`] wrote: it repeats comments and defaults for
/// each of several tables, and may be longer than what a user writes.
///
/// # Errors
/// As [`read`].
pub fn read_listing(settings: &mut dyn Settings, source_name: &str, text: &str) -> Result<()> {
    read_any(settings, &[], source_name, text, &[])
}

fn read_any(
    settings: &mut dyn Settings,
    habits: &[Habit],
    source_name: &str,
    text: &str,
    overrides: &[String],
) -> Result<()> {
    let (tree, mut problems) = tree::parse(text);
    if let Some(what) = notation::foreign(text).filter(|_| !problems.is_empty()) {
        return Err(Error::Config {
            source_name: source_name.into(),
            problems: vec![words::problem("text", "", what)],
        });
    }
    let tree = tree::with_overrides(tree, overrides, &mut problems);
    refuse(source_name, read_tree(settings, &tree, habits, problems))
}

/// Reads `settings` from a JSON object on top of their present values, as strictly as [`read`].
///
/// # Errors
/// [`Error::Config`] with every problem found.
pub fn read_json(
    settings: &mut dyn Settings,
    source_name: &str,
    object: &serde_json::Map<String, serde_json::Value>,
) -> Result<()> {
    refuse(source_name, read_tree(settings, &tree::of_json(object), &[], Vec::new()))
}

/// Reads the tree and returns all problems, those that are known already first.
fn read_tree(
    settings: &mut dyn Settings,
    tree: &Node,
    habits: &[Habit],
    known: Vec<ConfigProblem>,
) -> Vec<ConfigProblem> {
    let mut findings = Findings { problems: known, ..Findings::default() };
    read::read(settings, tree, &mut findings);
    // Only now is it known which members the families have, and so which keys there are.
    let guide = Guide { paths: Listing::of(settings).paths(), habits };
    let unknown = findings.unknown.iter().flat_map(|unknown| guide.problems(unknown));
    findings.problems.into_iter().chain(unknown).collect()
}

fn refuse(source_name: &str, problems: Vec<ConfigProblem>) -> Result<()> {
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Config { source_name: source_name.into(), problems })
    }
}

/// The table that a text is; none for a text that is no TOML, or longer than any configuration: the
/// parser takes a thousand times as much memory.
pub fn table(text: &str) -> Option<toml::Table> {
    if text.len() <= MAX_BYTES { toml::from_str(text).ok() } else { None }
}

/// Settings without tables as a JSON object; keys that are unset are `null`.
pub fn write_json(settings: &mut dyn Settings) -> serde_json::Map<String, serde_json::Value> {
    let values: toml::Table = toml::from_str(&write(settings)).expect("a listing is TOML");
    let value = |key: &String| {
        values.get(key).map_or(serde_json::Value::Null, |value| serde_json::json!(value))
    };
    Listing::of(settings).paths().iter().map(|key| (key.clone(), value(key))).collect()
}

/// The settings as TOML text with one comment line a key, complete and readable by [`read`].
pub fn write(settings: &mut dyn Settings) -> String {
    Listing::of(settings).text()
}

#[cfg(test)]
mod several_tests;
#[cfg(test)]
mod tests;
