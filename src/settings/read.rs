//! Reading: walks a settings struct along the tree and collects every problem.

use super::keys::{Keys, Mode, nearest, problem};
use super::tree::{Leaf, Node, Value};
use super::{Family, Habit, Settings, write};
use crate::error::ConfigProblem;

#[derive(Default)]
pub(super) struct Reader {
    problems: Vec<ConfigProblem>,
    unknown: Vec<Unknown>,
}

/// A key or table that the settings do not have.
struct Unknown {
    path: String,
    node: Node,
    /// Names that its table has.
    known: Vec<String>,
}

impl Reader {
    /// Reads the document into `settings` and returns all problems, those that are known already
    /// first.
    pub fn read(
        settings: &mut dyn Settings,
        tree: &Node,
        problems: Vec<ConfigProblem>,
    ) -> Vec<ConfigProblem> {
        let mut reader = Reader { problems, ..Reader::default() };
        reader.nested(settings, Some(tree), String::new());
        // Only now is it known which members the families have, and so which keys there are.
        let guide = Guide { paths: write::paths(settings), habits: settings.habits() };
        let unknown = reader.unknown.iter().flat_map(|unknown| guide.problems(unknown));
        reader.problems.into_iter().chain(unknown).collect()
    }

    pub fn nested(&mut self, settings: &mut dyn Settings, node: Option<&Node>, path: String) {
        let node = match node {
            Some(Node { value: Value::Leaf(leaf), place }) => {
                self.problems.push(problem(
                    &path,
                    place,
                    leaf.not_a(&format!("a table, [{path}]")),
                ));
                None
            }
            node => node,
        };
        let mut keys = Keys {
            mode: Mode::Read { reader: self, table: node, known: Vec::new() },
            path: path.clone(),
        };
        settings.visit(&mut keys);
        let Mode::Read { known, .. } = keys.mode else { unreachable!("a reader stays a reader") };
        for (name, node) in node
            .map(Node::entries)
            .unwrap_or_default()
            .iter()
            .filter(|(name, _)| !known.contains(name))
        {
            self.unknown.push(Unknown {
                path: joined(&path, name),
                node: node.clone(),
                known: known.clone(),
            });
        }
    }

    /// The member that `table` names, if any; the family keeps its default otherwise. Returns
    /// whether one is named.
    pub fn member<F: Family>(&mut self, family: &mut F, table: &Node, path: &str) -> bool {
        let named: Vec<_> = table
            .entries()
            .iter()
            .filter_map(|(name, node)| Some((name, node, F::named(name)?)))
            .collect();
        if let [_, (second, node, _), ..] = named.as_slice() {
            let what = format!("one table too many; choose one of {}", F::NAMES.join(", "));
            self.problems.push(problem(&format!("{path}.{second}"), &node.place, what));
        }
        let Some((name, node, default)) = named.into_iter().next() else { return false };
        // Settings of the member that is chosen already are kept, so that files and overrides add
        // up.
        if family.name() != name {
            *family = default;
        }
        self.nested(family.settings(), Some(node), format!("{path}.{name}"));
        true
    }

    pub fn leaf(
        &mut self,
        node: &Node,
        path: String,
        read: impl FnOnce(&Leaf) -> Result<(), String>,
    ) {
        let outcome = match &node.value {
            Value::Leaf(leaf) => read(leaf),
            Value::Table(_) => Err("expected a value, found a table".into()),
        };
        if let Err(what) = outcome {
            self.problems.push(problem(&path, &node.place, what));
        }
    }
}

/// Names that mean something in their own table only: they are no hint to another one that has
/// them.
const OF_THEIR_TABLE: [&str; 1] = ["enabled"];

/// The keys that there are, and what they are called elsewhere.
struct Guide {
    /// Every valid path of the document.
    paths: Vec<String>,
    habits: &'static [Habit],
}

impl Guide {
    /// One problem for the key or table; one for each of a table's keys where any of them is known
    /// under another name.
    fn problems(&self, Unknown { path, node, known }: &Unknown) -> Vec<ConfigProblem> {
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
        match &node.value {
            Value::Leaf(_) => found.push((path, node.place.clone())),
            Value::Table(_) => leaves(&path, node, found),
        }
    }
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn joined(table: &str, name: &str) -> String {
    if table.is_empty() { name.into() } else { format!("{table}.{name}") }
}
