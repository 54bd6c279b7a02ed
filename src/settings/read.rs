//! Reading: walks settings along a document and collects every problem.

use super::hints::Unknown;
use super::keys::{Field, Key, Keys, Members, Settings, Tables};
use super::tree::{Content, Node};
use super::words::{joined, problem};
use crate::error::ConfigProblem;

/// The problems of a document.
#[derive(Default)]
pub(super) struct Findings {
    pub problems: Vec<ConfigProblem>,
    /// Keys that the settings do not have.
    pub unknown: Vec<Unknown>,
}

/// Reads the document into `settings`; every problem is added to `findings`.
pub(super) fn read(settings: &mut dyn Settings, tree: &Node, findings: &mut Findings) {
    findings.table(settings, Some(tree), String::new());
}

impl Findings {
    fn problem(&mut self, path: &str, place: &str, what: String) {
        self.problems.push(problem(path, place, what));
    }

    /// Reads the table at `path`, if the document has one.
    fn table(&mut self, settings: &mut dyn Settings, node: Option<&Node>, path: String) {
        if let Some(found) = node.filter(|node| !node.content.is_table()) {
            let what = found.content.not_a(&format!("a table, [{path}]"));
            self.problem(&path, &found.place, what);
        }
        let node = node.filter(|node| node.content.is_table());
        let mut reader =
            TableReader { findings: self, node, path: path.clone(), known: Vec::new() };
        settings.visit(&mut reader);
        let known = reader.known;
        let entries = node.map(Node::entries).unwrap_or_default();
        for (name, node) in entries.iter().filter(|(name, _)| !known.contains(name)) {
            let path = joined(&path, name);
            self.unknown.push(Unknown { path, node: node.clone(), known: known.clone() });
        }
    }
}

/// Reads one table.
struct TableReader<'r> {
    findings: &'r mut Findings,
    node: Option<&'r Node>,
    path: String,
    /// Names that the table has.
    known: Vec<String>,
}

impl<'r> TableReader<'r> {
    /// Returns the document's node of this name and adds the name to the known ones.
    fn find(&mut self, name: &str) -> Option<&'r Node> {
        self.known.push(name.into());
        self.node.and_then(|node| node.get(name))
    }
}

impl Keys for TableReader<'_> {
    fn value(&mut self, key: Key<'_>, field: &mut dyn Field) {
        let Some(node) = self.find(key.name) else { return };
        let path = joined(&self.path, key.name);
        for misfit in field.read(node).err().unwrap_or_default() {
            self.findings.problem(&(path.clone() + &misfit.within), &misfit.place, misfit.what);
        }
    }

    fn table(&mut self, key: Key<'_>, settings: &mut dyn Settings) {
        let node = self.find(key.name);
        self.findings.table(settings, node, joined(&self.path, key.name));
    }

    fn tables(&mut self, key: Key<'_>, tables: &mut dyn Tables) {
        let Some(node) = self.find(key.name) else { return };
        let path = joined(&self.path, key.name);
        let Content::List(items) = &node.content else {
            let expected = format!("an array of tables, [[{path}]]");
            let what = match node.content {
                Content::Table(_) => format!("expected {expected}, found a table"),
                _ => node.content.not_a(&expected),
            };
            return self.findings.problem(&path, &node.place, what);
        };
        tables.reset(items.len());
        for (index, (settings, item)) in tables.all().into_iter().zip(items).enumerate() {
            self.findings.table(settings, Some(item), format!("{path}[{index}]"));
        }
    }

    fn family(&mut self, key: Key<'_>, family: &mut dyn Members) {
        self.table(key, &mut OnlyMember { key, family });
    }

    fn member(&mut self, _: Key<'_>, family: &mut dyn Members) {
        let names = family.names();
        self.known.extend(names.iter().map(ToString::to_string));
        let entries = self.node.map(Node::entries).unwrap_or_default();
        let named: Vec<_> =
            entries.iter().filter(|(name, _)| names.contains(&name.as_str())).collect();
        if let [_, (second, node), ..] = named.as_slice() {
            let what = format!("one table too many; choose one of {}", names.join(", "));
            self.findings.problem(&joined(&self.path, second), &node.place, what);
        }
        let Some((name, node)) = named.into_iter().next() else { return };
        family.choose(name);
        self.findings.table(family.settings(), Some(node), joined(&self.path, name));
    }
}

/// The table of a family that has no keys beside its member.
struct OnlyMember<'f, 'k> {
    key: Key<'k>,
    family: &'f mut dyn Members,
}

impl Settings for OnlyMember<'_, '_> {
    fn visit(&mut self, keys: &mut dyn Keys) {
        keys.member(self.key, self.family);
    }
}
