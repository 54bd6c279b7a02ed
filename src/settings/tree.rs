//! TOML text, `--set` overrides or a JSON object as one tree whose every node remembers where it
//! was written.

use std::ops::Range;

use toml::de::{DeInteger, DeTable, DeValue};

use super::keys::problem;
use crate::error::ConfigProblem;

/// A value that is not a table.
#[derive(Clone, Debug, PartialEq)]
pub enum Leaf {
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Text(String),
    /// An array of nothing but integers.
    Integers(Vec<i64>),
    /// An integer beyond 64 bits, another array, a date: no key takes one.
    Other(String),
}

impl Leaf {
    /// "expected an integer, found a text".
    pub(super) fn not_a(&self, expected: &str) -> String {
        let found = match self {
            Leaf::Integer(value) => format!("the integer {value}"),
            Leaf::Float(value) => format!("the number {value:?}"),
            Leaf::Boolean(value) => format!("{value}"),
            Leaf::Text(value) => format!("the text \"{value}\""),
            Leaf::Integers(values) => format!("the array {values:?}"),
            Leaf::Other(what) => what.clone(),
        };
        format!("expected {expected}, found {found}")
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// `line 12` or `--set`.
    pub place: String,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Leaf(Leaf),
    /// In the order of the text.
    Table(Vec<(String, Node)>),
}

impl Node {
    pub fn get(&self, name: &str) -> Option<&Node> {
        self.entries().iter().find(|(key, _)| key == name).map(|(_, node)| node)
    }

    /// Entries of a table; none for a leaf.
    pub fn entries(&self) -> &[(String, Node)] {
        match &self.value {
            Value::Table(entries) => entries,
            Value::Leaf(_) => &[],
        }
    }

    /// Lays `over` on top of this node: tables are merged, leaves replaced.
    fn merge(&mut self, over: Node) {
        match (&mut self.value, over.value) {
            (Value::Table(entries), Value::Table(new)) => {
                for (name, node) in new {
                    match entries.iter_mut().find(|(key, _)| *key == name) {
                        Some((_, old)) => old.merge(node),
                        None => entries.push((name, node)),
                    }
                }
            }
            (value, new) => {
                *value = new;
                self.place = over.place;
            }
        }
    }
}

/// Every table and leaf of `text`, and every syntax error in it.
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
    let node = Node { place: String::new(), value: table_value(table.get_ref(), &line) };
    (node, errors.iter().map(as_problem).collect())
}

fn table_value(table: &DeTable<'_>, line: &dyn Fn(Range<usize>) -> String) -> Value {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let node = |value: &toml::Spanned<DeValue<'_>>, place| Node {
        place,
        value: node_value(value.get_ref(), line),
    };
    Value::Table(
        entries
            .into_iter()
            .map(|(key, value)| (key.get_ref().to_string(), node(value, line(key.span()))))
            .collect(),
    )
}

fn node_value(value: &DeValue<'_>, line: &dyn Fn(Range<usize>) -> String) -> Value {
    Value::Leaf(match value {
        DeValue::Table(table) => return table_value(table, line),
        DeValue::String(text) => Leaf::Text(text.to_string()),
        DeValue::Boolean(value) => Leaf::Boolean(*value),
        DeValue::Integer(integer) => match small(integer) {
            Some(value) => Leaf::Integer(value),
            None => Leaf::Other(format!("{integer}, which is beyond 64 bits")),
        },
        DeValue::Float(float) => Leaf::Float(float.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Datetime(_) => Leaf::Other("a date".into()),
        DeValue::Array(items) => {
            let integer = |item: &toml::Spanned<DeValue<'_>>| {
                if let DeValue::Integer(found) = item.get_ref() { small(found) } else { None }
            };
            items
                .iter()
                .map(integer)
                .collect::<Option<_>>()
                .map_or_else(|| Leaf::Other("an array".into()), Leaf::Integers)
        }
    })
}

fn small(integer: &DeInteger<'_>) -> Option<i64> {
    i64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

/// A JSON object as a tree. A `null` is as good as a key that is not there.
pub(super) fn of_json(object: &serde_json::Map<String, serde_json::Value>) -> Node {
    use serde_json::Value as Json;
    let leaf = |value: &Json| match value {
        Json::Bool(value) => Leaf::Boolean(*value),
        Json::String(text) => Leaf::Text(text.clone()),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(value), _) => Leaf::Integer(value),
            (None, value) => Leaf::Float(value.unwrap_or(f64::NAN)),
        },
        Json::Array(items) => match items.iter().map(Json::as_i64).collect() {
            Some(integers) => Leaf::Integers(integers),
            None => Leaf::Other("an array".into()),
        },
        Json::Object(_) | Json::Null => Leaf::Other("an object".into()),
    };
    let present = object.iter().filter(|(_, value)| !value.is_null());
    let entries = present.map(|(name, value)| {
        (name.clone(), Node { place: String::new(), value: Value::Leaf(leaf(value)) })
    });
    Node { place: String::new(), value: Value::Table(entries.collect()) }
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
            let quoted = format!("{path} = {}", super::write::quoted(value.trim()));
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
    if let Value::Table(entries) = &mut node.value {
        entries.iter_mut().for_each(|(_, node)| mark_as_override(node));
    }
}
