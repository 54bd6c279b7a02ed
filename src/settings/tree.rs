//! TOML text, `--set` overrides or a JSON object as one tree whose every node remembers where it
//! was written.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::words::{problem, quoted};
use crate::error::ConfigProblem;

/// The value of a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Text(String),
    /// An integer beyond 64 bits, a date, a JSON object: no key takes one.
    Other(String),
    List(Vec<Node>),
    /// In the order of the text.
    Table(Vec<(String, Node)>),
}

impl Content {
    /// "expected an integer, found the text "x"".
    pub fn not_a(&self, expected: &str) -> String {
        let found = match self {
            Content::Integer(value) => format!("the integer {value}"),
            Content::Float(value) => format!("the number {value:?}"),
            Content::Boolean(value) => format!("{value}"),
            Content::Text(value) => format!("the text \"{value}\""),
            Content::Other(what) => what.clone(),
            Content::List(_) => match self.integers() {
                Some(values) => format!("the array {values:?}"),
                None => "an array".into(),
            },
            Content::Table(_) => return "expected a value, found a table".into(),
        };
        format!("expected {expected}, found {found}")
    }

    /// The text that it is.
    ///
    /// # Errors
    /// As [`Content::not_a`].
    pub fn text(&self, expected: &str) -> Result<&str, String> {
        match self {
            Content::Text(text) => Ok(text),
            _ => Err(self.not_a(expected)),
        }
    }

    /// The items of an array of nothing but integers.
    pub(super) fn integers(&self) -> Option<Vec<i64>> {
        let Content::List(items) = self else { return None };
        let integer = |item: &Node| match item.content {
            Content::Integer(value) => Some(value),
            _ => None,
        };
        items.iter().map(integer).collect()
    }

    pub(super) fn is_table(&self) -> bool {
        matches!(self, Content::Table(_))
    }
}

/// A key's content and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// `line 12` or `--set`; empty in a JSON object.
    pub(super) place: String,
    pub(super) content: Content,
}

impl Node {
    pub(super) fn get(&self, name: &str) -> Option<&Node> {
        self.entries().iter().find(|(key, _)| key == name).map(|(_, node)| node)
    }

    /// Entries of a table; none of anything else.
    pub(super) fn entries(&self) -> &[(String, Node)] {
        match &self.content {
            Content::Table(entries) => entries,
            _ => &[],
        }
    }

    /// Lays `over` on top of this node: tables are merged, all else is replaced.
    fn merge(&mut self, over: Node) {
        match (&mut self.content, over.content) {
            (Content::Table(entries), Content::Table(new)) => {
                for (name, node) in new {
                    match entries.iter_mut().find(|(key, _)| *key == name) {
                        Some((_, old)) => old.merge(node),
                        None => entries.push((name, node)),
                    }
                }
            }
            (content, new) => {
                *content = new;
                self.place = over.place;
            }
        }
    }
}

/// The document that `text` is, and every syntax error in it.
pub(super) fn parse(text: &str) -> (Node, Vec<ConfigProblem>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let line = |span: Range<usize>| {
        format!("line {}", 1 + text[..span.start.min(text.len())].matches('\n').count())
    };
    let as_problem = |error: &toml::de::Error| {
        let place = error.span().map(&line).unwrap_or_default();
        let quoted = error
            .span()
            .and_then(|span| text.get(span))
            .filter(|piece| !piece.is_empty() && piece.len() < 60);
        problem(quoted.unwrap_or("syntax").trim(), &place, error.message().replace('\n', "; "))
    };
    let node = Node { place: String::new(), content: table_content(table.get_ref(), &line) };
    (node, errors.iter().map(as_problem).collect())
}

fn table_content(table: &DeTable<'_>, line: &dyn Fn(Range<usize>) -> String) -> Content {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let node = |value: &Spanned<DeValue<'_>>, place| Node {
        place,
        content: content(value.get_ref(), line),
    };
    Content::Table(
        entries
            .into_iter()
            .map(|(key, value)| (key.get_ref().to_string(), node(value, line(key.span()))))
            .collect(),
    )
}

fn content(value: &DeValue<'_>, line: &dyn Fn(Range<usize>) -> String) -> Content {
    match value {
        DeValue::Table(table) => table_content(table, line),
        DeValue::String(text) => Content::Text(text.to_string()),
        DeValue::Boolean(value) => Content::Boolean(*value),
        DeValue::Integer(integer) => match small(integer) {
            Some(value) => Content::Integer(value),
            None => Content::Other(format!("{integer}, which is beyond 64 bits")),
        },
        DeValue::Float(float) => Content::Float(float.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Datetime(_) => Content::Other("a date".into()),
        DeValue::Array(items) => {
            let node = |item: &Spanned<DeValue<'_>>| Node {
                place: line(item.span()),
                content: content(item.get_ref(), line),
            };
            Content::List(items.iter().map(node).collect())
        }
    }
}

fn small(integer: &DeInteger<'_>) -> Option<i64> {
    i64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

/// A JSON object as a tree. A `null` is as good as a key that is not there.
pub(super) fn of_json(object: &serde_json::Map<String, serde_json::Value>) -> Node {
    let present = object.iter().filter(|(_, value)| !value.is_null());
    let entries = present.map(|(name, value)| (name.clone(), json_node(value)));
    Node { place: String::new(), content: Content::Table(entries.collect()) }
}

fn json_node(value: &serde_json::Value) -> Node {
    use serde_json::Value as Json;
    let content = match value {
        Json::Bool(value) => Content::Boolean(*value),
        Json::String(text) => Content::Text(text.clone()),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(value), _) => Content::Integer(value),
            (None, value) => Content::Float(value.unwrap_or(f64::NAN)),
        },
        Json::Array(items) => Content::List(items.iter().map(json_node).collect()),
        Json::Object(_) | Json::Null => Content::Other("an object".into()),
    };
    Node { place: String::new(), content }
}

/// Lays each `key.path=value` over the tree, in order. A value that is no TOML is taken as text, so
/// that `--set output_dir=runs/x` needs no quotes within quotes.
pub(super) fn with_overrides(
    mut tree: Node,
    overrides: &[String],
    problems: &mut Vec<ConfigProblem>,
) -> Node {
    for text in overrides {
        let Some((path, value)) = text.split_once('=') else {
            problems.push(problem(text, "--set", "expected key.path=value".into()));
            continue;
        };
        let (mut node, errors) = parse(text);
        if !errors.is_empty() {
            let quoted = format!("{path} = {}", quoted(value.trim()));
            let (as_text, errors) = parse(&quoted);
            if let Some(first) = errors.into_iter().next() {
                problems.push(ConfigProblem {
                    key: path.trim().into(),
                    place: "--set".into(),
                    ..first
                });
                continue;
            }
            node = as_text;
        }
        mark_as_override(&mut node);
        tree.merge(node);
    }
    tree
}

fn mark_as_override(node: &mut Node) {
    node.place = "--set".into();
    match &mut node.content {
        Content::Table(entries) => entries.iter_mut().for_each(|(_, node)| mark_as_override(node)),
        Content::List(items) => items.iter_mut().for_each(mark_as_override),
        _ => (),
    }
}
