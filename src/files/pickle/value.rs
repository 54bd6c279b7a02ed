//! The object that a pickle describes, as plain data.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::torch::PickledTensor;

/// A value of a pickle. Tuples are lists.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Arc<str>),
    List(Vec<Value>),
    /// Values by key; an integer key is its text.
    Dict(BTreeMap<String, Value>),
    Tensor(PickledTensor),
}

impl Value {
    /// Returns the value under a key; `None` if there is none or this is no dictionary.
    pub fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Value::Dict(entries) => entries.get(key),
            _ => None,
        }
    }

    /// Returns the entries of a dictionary.
    pub fn entries(&self) -> Option<&BTreeMap<String, Value>> {
        match self {
            Value::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    pub fn tensor(&self) -> Option<&PickledTensor> {
        match self {
            Value::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// Returns the values of a list or tuple.
    pub fn list(&self) -> Option<&[Value]> {
        match self {
            Value::List(values) => Some(values),
            _ => None,
        }
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}
