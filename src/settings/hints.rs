//! Hints at the key that was meant, where a document has one that the settings do not have.

use super::tree::{Content, Node};
use super::words::{joined, nearest, problem};
use crate::error::ConfigProblem;

/// Names that other programs have for one thing, and the keys that say it here.
#[derive(Debug)]
pub struct Habit {
    /// Names of keys or tables, or dotted paths, with spaces between them.
    pub theirs: &'static str,
    /// Dotted paths; `*` stands for the chosen member of a family. Empty where there is no
    /// counterpart.
    pub ours: &'static [&'static str],
    /// Words that follow; empty where the keys say enough.
    pub remark: &'static str,
}

/// A key or table that the settings do not have.
pub(super) struct Unknown {
    pub path: String,
    pub node: Node,
    /// Names that its table has.
    pub known: Vec<String>,
}

/// Names that mean something in their own table only: they are no hint to another one that has
/// them.
const OF_THEIR_TABLE: [&str; 1] = ["enabled"];

/// The keys that there are, and what they are called elsewhere.
pub(super) struct Guide<'h> {
    /// Every valid path of the document.
    pub paths: Vec<String>,
    pub habits: &'h [Habit],
}

impl Guide<'_> {
    /// One problem for the key or table; one for each of a table's keys where any of them is known
    /// under another name.
    pub fn problems(&self, Unknown { path, node, known }: &Unknown) -> Vec<ConfigProblem> {
        let (table, name) = path.rsplit_once('.').unwrap_or(("", path));
        let mut inside = Vec::new();
        leaves(path, node, &mut inside);
        let habit = self.habit(path);
        let hints: Vec<_> = inside
            .iter()
            .map(|(path, _)| self.habit(path).or_else(|| self.elsewhere(last(path))))
            .collect();
        if habit.is_none() && hints.iter().any(Option::is_some) {
            let told = |hint: Option<String>| {
                hint.map_or_else(|| "unknown key".into(), |hint| format!("unknown key; {hint}"))
            };
            return inside
                .iter()
                .zip(hints)
                .map(|((path, place), hint)| problem(path, place, told(hint)))
                .collect();
        }
        let near = || {
            nearest(name, known.iter().map(String::as_str))
                .map(|near| format!("did you mean {}?", joined(table, near)))
        };
        let near_path = || {
            nearest(path, self.paths.iter().map(String::as_str))
                .map(|near| format!("did you mean {near}?"))
        };
        let hint = habit.or_else(near).or_else(|| self.elsewhere(name)).or_else(near_path);
        let hint = hint.unwrap_or_else(|| format!("this table has {}", known.join(", ")));
        vec![problem(path, &node.place, format!("unknown key; {hint}"))]
    }

    /// The key's counterpart where another program calls it so.
    fn habit(&self, path: &str) -> Option<String> {
        let is_named = |name: &str| name == path || name == last(path);
        let Habit { ours, remark, .. } =
            self.habits.iter().find(|habit| habit.theirs.split_whitespace().any(is_named))?;
        let keys: Vec<&str> = ours.iter().filter_map(|key| self.path_like(key)).collect();
        match (keys.is_empty(), ours.is_empty()) {
            (true, false) => None,
            (true, true) => Some(remark.to_string()),
            (false, _) if remark.is_empty() => Some(format!("did you mean {}?", keys.join(" or "))),
            (false, _) => Some(format!("did you mean {}? ({remark})", keys.join(" or "))),
        }
    }

    /// The valid path that `key` stands for, in which one name may be `*`.
    fn path_like(&self, key: &str) -> Option<&str> {
        let (before, after) = key.split_once('*').unwrap_or((key, ""));
        let fits = |path: &&str| {
            *path == key || key.contains('*') && path.starts_with(before) && path.ends_with(after)
        };
        self.paths.iter().map(String::as_str).find(fits)
    }

    /// The one other table that has a key of this name.
    fn elsewhere(&self, name: &str) -> Option<String> {
        let mut same =
            self.paths.iter().filter(|path| last(path) == name && !OF_THEIR_TABLE.contains(&name));
        same.next().filter(|_| same.next().is_none()).map(|path| format!("did you mean {path}?"))
    }
}

/// Paths and places of the keys inside of a table.
fn leaves(path: &str, node: &Node, found: &mut Vec<(String, String)>) {
    for (name, node) in node.entries() {
        let path = joined(path, name);
        match node.content {
            Content::Table(_) => leaves(&path, node, found),
            _ => found.push((path, node.place.clone())),
        }
    }
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}
