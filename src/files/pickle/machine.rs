//! The stack machine of pickles, reduced to what files of tensors need.
//!
//! Objects lie in a list and refer to each other by number, since a pickle may change an object
//! after others refer to it. The object that comes out is copied from there within limits of count
//! and depth: references in a circle, or many to the same large object, cost no more than a sound
//! file.
//!
//! Source: CPython 3.13, `Lib/pickletools.py`.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::torch::{Global, MAX_AXES, PickledTensor, Storage};
use super::value::Value;

/// Maximum number of opcodes. Every object, entry and reference takes one, so that this bounds
/// memory.
const MAX_OPCODES: usize = 1 << 16;
/// Maximum number of values that come out, and of the lists around one of them.
const MAX_VALUES: usize = 1 << 15;
const MAX_DEPTH: usize = 32;
const MAX_NAME_BYTES: usize = 128;
/// Newest protocol of pickles.
const NEWEST_PROTOCOL: u8 = 5;

/// An object while the pickle is read.
#[derive(Clone, Debug)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Arc<str>),
    List(Vec<usize>),
    Tuple(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Global(Global),
    Storage(Storage),
    Tensor(PickledTensor),
}

/// A pickle being read.
pub(super) struct Machine<'p> {
    pickle: &'p [u8],
    place: usize,
    nodes: Vec<Node>,
    stack: Vec<usize>,
    /// Heights of the stack at which marks lie.
    marks: Vec<usize>,
    memo: BTreeMap<u32, usize>,
    /// Length of the storage with a key, in bytes.
    storage_bytes: &'p dyn Fn(&str) -> Option<u64>,
}

impl<'p> Machine<'p> {
    pub fn new(pickle: &'p [u8], storage_bytes: &'p dyn Fn(&str) -> Option<u64>) -> Self {
        let (nodes, stack, marks) = (Vec::new(), Vec::new(), Vec::new());
        let memo = BTreeMap::new();
        Machine { pickle, place: 0, nodes, stack, marks, memo, storage_bytes }
    }

    /// Returns the object that the pickle describes.
    ///
    /// # Errors
    /// The reason why the pickle is refused.
    pub fn run(mut self) -> Result<Value, String> {
        for _ in 0..MAX_OPCODES {
            let start = self.place;
            let opcode = self.byte()?;
            if opcode == b'.' {
                let root = self.pop()?;
                let mut left = MAX_VALUES;
                return self.value(root, MAX_DEPTH, &mut left);
            }
            self.act(opcode).map_err(|what| match what {
                Some(what) => what,
                None => format!(
                    "is a pickle with opcode {opcode:#04x} at byte {start}, which files of tensors \
                     do not need; it is not run, and the file is not read"
                ),
            })?;
        }
        Err(format!("is a pickle of more than {MAX_OPCODES} opcodes"))
    }

    /// Executes one opcode; the error is `None` if it is not allowed.
    fn act(&mut self, opcode: u8) -> Result<(), Option<String>> {
        match opcode {
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'J' => self.integer(4)?,
            b'K' | b'M' => {
                let number = self.unsigned(if opcode == b'K' { 1 } else { 2 })?;
                self.push(Node::Int(number as i64));
            }
            0x8a => {
                let width = self.byte()?;
                self.integer(usize::from(width))?;
            }
            b'G' => {
                let bytes = self.bytes(8)?.try_into().expect("eight bytes");
                self.push(Node::Float(f64::from_be_bytes(bytes)));
            }
            b'X' => self.text()?,
            b'(' => self.marks.push(self.stack.len()),
            b')' => self.push(Node::Tuple(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            b't' => {
                let parts = self.above_mark()?;
                self.push(Node::Tuple(parts));
            }
            0x85..=0x87 => {
                let parts = self.top(usize::from(opcode - 0x84))?;
                self.push(Node::Tuple(parts));
            }
            b'a' | b'e' | b's' | b'u' => self.extend(opcode)?,
            b'q' | b'r' | b'h' | b'j' => self.remember(opcode)?,
            b'c' => self.global()?,
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            0x80 => self.protocol()?,
            _ => return Err(None),
        }
        Ok(())
    }

    fn protocol(&mut self) -> Result<(), String> {
        match self.byte()? {
            2..=NEWEST_PROTOCOL => Ok(()),
            other => {
                Err(format!("is a pickle of protocol {other}; expected 2, which torch writes"))
            }
        }
    }

    /// Appends to a list, or sets entries of a dictionary: one, or all above the mark.
    fn extend(&mut self, opcode: u8) -> Result<(), String> {
        let parts = match opcode {
            b'a' => self.top(1)?,
            b's' => self.top(2)?,
            _ => self.above_mark()?,
        };
        let target = *self.stack.last().ok_or_else(empty)?;
        match (&mut self.nodes[target], opcode) {
            (Node::List(entries), b'a' | b'e') => entries.extend(parts),
            (Node::Dict(entries), b's' | b'u') if parts.len().is_multiple_of(2) => {
                entries.extend(parts.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err("is a pickle that adds to what is no list or dictionary".into()),
        }
        Ok(())
    }

    /// Stores the topmost object under a number, or pushes the one that was stored.
    fn remember(&mut self, opcode: u8) -> Result<(), String> {
        let wide = matches!(opcode, b'r' | b'j');
        let number = self.unsigned(if wide { 4 } else { 1 })? as u32;
        if matches!(opcode, b'q' | b'r') {
            self.memo.insert(number, *self.stack.last().ok_or_else(empty)?);
        } else {
            let found = self.memo.get(&number);
            let missing = || format!("is a pickle that refers to object {number} before it exists");
            self.stack.push(*found.ok_or_else(missing)?);
        }
        Ok(())
    }

    fn integer(&mut self, width: usize) -> Result<(), String> {
        if width > 8 {
            return Err("is a pickle with an integer of more than 64 bits".into());
        }
        let number = self.unsigned(width)?;
        let unused = 64 - 8 * width as u32;
        // Two's complement of `width` bytes; none stand for 0.
        let signed = if width == 0 { 0 } else { (number << unused) as i64 >> unused };
        self.push(Node::Int(signed));
        Ok(())
    }

    fn text(&mut self) -> Result<(), String> {
        let length = self.unsigned(4)? as usize;
        let text = std::str::from_utf8(self.bytes(length)?)
            .map_err(|_| "is a pickle with a text that is not UTF-8")?;
        let text = Node::Text(text.into());
        self.push(text);
        Ok(())
    }

    fn global(&mut self) -> Result<(), String> {
        let (module, name) = (self.line()?, self.line()?);
        let global = Global::named(module, name)?;
        self.push(Node::Global(global));
        Ok(())
    }

    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let Node::Tuple(parts) = &self.nodes[id] else {
            return Err("refers to something outside that is no storage of torch".into());
        };
        let parts: Vec<&Node> = parts.iter().map(|part| &self.nodes[*part]).collect();
        let storage = Storage::checked(&parts, self.storage_bytes)?;
        self.push(Node::Storage(storage));
        Ok(())
    }

    /// Calls one of the known functions.
    fn reduce(&mut self) -> Result<(), String> {
        let [function, arguments] = self.top(2)?[..] else { return Err(empty()) };
        let (Node::Global(global), Node::Tuple(arguments)) =
            (&self.nodes[function], &self.nodes[arguments])
        else {
            return Err("is a pickle that calls what is no function of torch; it is not run".into());
        };
        let result = match (global, &arguments[..]) {
            (Global::OrderedDict, []) => Node::Dict(Vec::new()),
            (Global::Size, [sizes]) if self.parts(*sizes)?.len() <= MAX_AXES => {
                Node::Tuple(self.parts(*sizes)?.to_vec())
            }
            (Global::RebuildParameter, [tensor, _, _])
                if matches!(self.nodes[*tensor], Node::Tensor(_)) =>
            {
                self.nodes[*tensor].clone()
            }
            (Global::RebuildTensor, [storage, offset, shape, strides, _, _, rest @ ..]) => {
                self.check_metadata(rest)?;
                Node::Tensor(self.tensor([*storage, *offset, *shape, *strides])?)
            }
            (
                Global::RebuildTensorOfKind,
                [storage, offset, shape, strides, _, _, kind, rest @ ..],
            ) => {
                self.check_metadata(rest)?;
                let Node::Global(Global::Kind(kind)) = self.nodes[*kind] else {
                    return Err("rebuilds a tensor whose kind is none of torch".into());
                };
                Node::Tensor(self.tensor([*storage, *offset, *shape, *strides])?.of_kind(kind)?)
            }
            (global, arguments) => {
                let count = arguments.len();
                return Err(format!("calls {global:?} with {count} arguments; it is not run"));
            }
        };
        self.push(result);
        Ok(())
    }

    fn tensor(
        &self,
        [storage, offset, shape, strides]: [usize; 4],
    ) -> Result<PickledTensor, String> {
        let (Node::Storage(storage), Node::Int(offset)) =
            (&self.nodes[storage], &self.nodes[offset])
        else {
            return Err("rebuilds a tensor without a storage".into());
        };
        let (shape, strides) = (self.integers(shape)?, self.integers(strides)?);
        PickledTensor::checked(storage, *offset, shape, strides)
    }

    /// Refuses tensors whose numbers are negated or conjugated when they are used.
    fn check_metadata(&self, rest: &[usize]) -> Result<(), String> {
        let is_empty = |id: &usize| match &self.nodes[*id] {
            Node::None => true,
            Node::Dict(entries) => entries.is_empty(),
            _ => false,
        };
        if rest.iter().all(is_empty) {
            return Ok(());
        }
        Err("holds a tensor with metadata, whose numbers are not those of its storage".into())
    }

    fn parts(&self, id: usize) -> Result<&[usize], String> {
        match &self.nodes[id] {
            Node::Tuple(parts) | Node::List(parts) => Ok(parts),
            _ => Err("rebuilds a tensor whose shape is no tuple".into()),
        }
    }

    fn integers(&self, id: usize) -> Result<Vec<i64>, String> {
        let integer = |part: &usize| match &self.nodes[*part] {
            Node::Int(number) => Ok(*number),
            _ => Err("rebuilds a tensor whose shape has other than integers".to_string()),
        };
        self.parts(id)?.iter().map(integer).collect()
    }

    /// Copies an object. `depth` and `left`: levels and values that it may still have.
    fn value(&self, id: usize, depth: usize, left: &mut usize) -> Result<Value, String> {
        *left =
            left.checked_sub(1).ok_or_else(|| format!("holds more than {MAX_VALUES} values"))?;
        let deeper =
            depth.checked_sub(1).ok_or_else(|| format!("nests deeper than {MAX_DEPTH} levels"))?;
        Ok(match &self.nodes[id] {
            Node::None => Value::None,
            Node::Bool(value) => Value::Bool(*value),
            Node::Int(value) => Value::Int(*value),
            Node::Float(value) => Value::Float(*value),
            Node::Text(text) => Value::Text(text.clone()),
            Node::Tensor(tensor) => Value::Tensor(tensor.clone()),
            Node::List(parts) | Node::Tuple(parts) => {
                let copied = parts.iter().map(|part| self.value(*part, deeper, left));
                Value::List(copied.collect::<Result<_, _>>()?)
            }
            Node::Dict(entries) => self.dictionary(entries, deeper, left)?,
            Node::Global(_) | Node::Storage(_) => {
                return Err("holds a class or a storage where tensors and numbers belong".into());
            }
        })
    }

    fn dictionary(
        &self,
        entries: &[(usize, usize)],
        depth: usize,
        left: &mut usize,
    ) -> Result<Value, String> {
        let mut copied = BTreeMap::new();
        for (key, entry) in entries {
            let key = match &self.nodes[*key] {
                Node::Text(text) if text.len() <= MAX_NAME_BYTES => text.to_string(),
                Node::Int(number) => number.to_string(),
                _ => return Err("holds a dictionary whose keys are no short texts".into()),
            };
            let entry = self.value(*entry, depth, left)?;
            if copied.contains_key(&key) {
                return Err(format!("holds `{}` twice", shown(&key)));
            }
            copied.insert(key, entry);
        }
        Ok(Value::Dict(copied))
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    fn pop(&mut self) -> Result<usize, String> {
        self.top(1).map(|parts| parts[0])
    }

    /// Takes the topmost objects off the stack, not below the last mark.
    fn top(&mut self, count: usize) -> Result<Vec<usize>, String> {
        let bottom = self.marks.last().copied().unwrap_or_default();
        let start = self.stack.len().checked_sub(count).filter(|start| *start >= bottom);
        Ok(self.stack.split_off(start.ok_or_else(empty)?))
    }

    fn above_mark(&mut self) -> Result<Vec<usize>, String> {
        let mark = self.marks.pop().ok_or_else(empty)?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.bytes(1).map(|bytes| bytes[0])
    }

    fn unsigned(&mut self, width: usize) -> Result<u64, String> {
        let bytes = self.bytes(width)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn bytes(&mut self, count: usize) -> Result<&'p [u8], String> {
        let rest = self.pickle.get(self.place..).unwrap_or_default();
        let taken = rest.get(..count).ok_or("is a pickle that ends within an opcode")?;
        self.place += count;
        Ok(taken)
    }

    fn line(&mut self) -> Result<&'p str, String> {
        let rest = self.pickle.get(self.place..).unwrap_or_default();
        let length = rest.iter().take(MAX_NAME_BYTES + 1).position(|byte| *byte == b'\n');
        let length = length.ok_or("is a pickle with a name that does not end")?;
        self.place += length + 1;
        std::str::from_utf8(&rest[..length])
            .map_err(|_| "is a pickle with a name that is no text".into())
    }
}

fn empty() -> String {
    "is a pickle that takes from an empty stack".into()
}

/// Returns the beginning of a text from a pickle, for a message.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(MAX_NAME_BYTES).collect()
}
