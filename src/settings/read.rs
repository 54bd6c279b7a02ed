//! Reading: walks a settings struct along the tree and collects every problem.

use super::keys::{Keys, Mode, nearest, problem};
use super::tree::{Leaf, Node, Value};
use super::{Family, Settings};
use crate::error::ConfigProblem;

pub(super) struct Reader {
    pub problems: Vec<ConfigProblem>,
    /// Every valid path of the document with default families, for "did you mean".
    paths: Vec<String>,
}

impl Reader {
    pub fn new(problems: Vec<ConfigProblem>, paths: Vec<String>) -> Self {
        Reader { problems, paths }
    }

    /// The whole document.
    pub fn table(&mut self, settings: &mut dyn Settings, tree: &Node) {
        self.nested(settings, Some(tree), String::new());
    }

    pub fn nested(&mut self, settings: &mut dyn Settings, node: Option<&Node>, path: String) {
        let node = match node {
            Some(Node { value: Value::Leaf(leaf), place }) => {
                self.problems.push(problem(&path, place, leaf.not_a(&format!("a table, [{path}]"))));
                None
            }
            node => node,
        };
        let mut keys = Keys { mode: Mode::Read { reader: self, table: node, known: Vec::new() }, path: path.clone() };
        settings.visit(&mut keys);
        let Mode::Read { known, .. } = keys.mode else { unreachable!("a reader stays a reader") };
        for (name, unknown) in node.map(Node::entries).unwrap_or_default().iter().filter(|(name, _)| !known.contains(name)) {
            self.unknown(&path, name, &unknown.place, &known);
        }
    }

    /// The member that `table` names, if any; the family keeps its default otherwise. Returns whether one is named.
    pub fn member<F: Family>(&mut self, family: &mut F, table: &Node, path: &str) -> bool {
        let named: Vec<_> = table.entries().iter().filter_map(|(name, node)| Some((name, node, F::named(name)?))).collect();
        if let [_, (second, node, _), ..] = named.as_slice() {
            let what = format!("one table too many; choose one of {}", F::NAMES.join(", "));
            self.problems.push(problem(&format!("{path}.{second}"), &node.place, what));
        }
        let Some((name, node, default)) = named.into_iter().next() else { return false };
        // Settings of the member that is chosen already are kept, so that files and overrides add up.
        if family.name() != name {
            *family = default;
        }
        self.nested(family.settings(), Some(node), format!("{path}.{name}"));
        true
    }

    pub fn leaf(&mut self, node: &Node, path: String, read: impl FnOnce(&Leaf) -> Result<(), String>) {
        let outcome = match &node.value {
            Value::Leaf(leaf) => read(leaf),
            Value::Table(_) => Err("expected a value, found a table".into()),
        };
        if let Err(what) = outcome {
            self.problems.push(problem(&path, &node.place, what));
        }
    }

    /// Looks for the name in the same table first, then for the same name in another table.
    fn unknown(&mut self, table: &str, name: &str, place: &str, known: &[String]) {
        let path = if table.is_empty() { name.into() } else { format!("{table}.{name}") };
        let prefix = path.strip_suffix(name).unwrap_or_default();
        let elsewhere = || self.paths.iter().find(|valid| valid.rsplit('.').next() == Some(name)).cloned();
        let near = nearest(name, known.iter().map(String::as_str)).map(|near| format!("{prefix}{near}"));
        let what = match near.or_else(elsewhere).or_else(|| nearest(&path, self.paths.iter().map(String::as_str)).map(String::from)) {
            Some(near) => format!("unknown key; did you mean {near}?"),
            None => format!("unknown key; this table has {}", known.join(", ")),
        };
        self.problems.push(problem(&path, place, what));
    }
}
