//! The names that a pickle may use: the storages of `torch` and the functions that rebuild tensors.

use std::sync::Arc;

use tch::Kind;

use super::machine::{Node, shown};

/// Maximum number of axes of a tensor.
pub(super) const MAX_AXES: usize = 8;

/// A class or function that a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    Size,
    RebuildTensor,
    /// As `RebuildTensor`, of a storage of bytes, with the kind as an argument.
    RebuildTensorOfKind,
    RebuildParameter,
    Storage(Kind),
    Kind(Kind),
}

const GLOBALS: [(&str, &str, Global); 18] = [
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch", "Size", Global::Size),
    ("torch._utils", "_rebuild_tensor_v2", Global::RebuildTensor),
    ("torch._utils", "_rebuild_tensor_v3", Global::RebuildTensorOfKind),
    ("torch._utils", "_rebuild_parameter", Global::RebuildParameter),
    ("torch", "BoolStorage", Global::Storage(Kind::Bool)),
    ("torch", "ByteStorage", Global::Storage(Kind::Uint8)),
    ("torch", "CharStorage", Global::Storage(Kind::Int8)),
    ("torch", "ShortStorage", Global::Storage(Kind::Int16)),
    ("torch", "IntStorage", Global::Storage(Kind::Int)),
    ("torch", "LongStorage", Global::Storage(Kind::Int64)),
    ("torch", "HalfStorage", Global::Storage(Kind::Half)),
    ("torch", "BFloat16Storage", Global::Storage(Kind::BFloat16)),
    ("torch", "FloatStorage", Global::Storage(Kind::Float)),
    ("torch", "DoubleStorage", Global::Storage(Kind::Double)),
    // Floats of 8 bits have no storage of their own.
    ("torch.storage", "UntypedStorage", Global::Storage(Kind::Uint8)),
    ("torch", "float8_e4m3fn", Global::Kind(Kind::Float8e4m3fn)),
    ("torch", "float8_e5m2", Global::Kind(Kind::Float8e5m2)),
];

impl Global {
    /// # Errors
    /// The name, if files of tensors do not need it.
    pub fn named(module: &str, name: &str) -> Result<Self, String> {
        let found = GLOBALS.iter().find(|known| (known.0, known.1) == (module, name));
        found.map(|(.., global)| *global).ok_or_else(|| {
            let (module, name) = (shown(module), shown(name));
            format!(
                "names `{module}.{name}`, which is neither a tensor nor a list of them; \
                 it is not run, and the file is not read"
            )
        })
    }
}

/// A storage that a pickle refers to: its key in the archive and its kind.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    key: Arc<str>,
    kind: Kind,
    elements: u64,
}

impl Storage {
    /// Checks `("storage", <class>, key, device, number of elements)`. `bytes_of`: length of the
    /// archive's entry with a key.
    pub fn checked(
        parts: &[&Node],
        bytes_of: &dyn Fn(&str) -> Option<u64>,
    ) -> Result<Self, String> {
        let [
            Node::Text(word),
            Node::Global(Global::Storage(kind)),
            Node::Text(key),
            _,
            Node::Int(elements),
        ] = parts
        else {
            return Err("refers to something outside that is no storage of torch".into());
        };
        let bytes = u64::try_from(*elements)
            .ok()
            .and_then(|elements| elements.checked_mul(kind.elt_size_in_bytes() as u64));
        match bytes_of(key) {
            Some(found) if &**word == "storage" && bytes == Some(found) => {
                Ok(Storage { key: key.clone(), kind: *kind, elements: *elements as u64 })
            }
            Some(found) => Err(format!(
                "says that storage `{}` has {elements} elements of {kind:?}, but it has {found} bytes",
                shown(key)
            )),
            None => Err(format!("refers to storage `{}`, which the archive lacks", shown(key))),
        }
    }
}

/// A tensor of a file: its kind, its shape, and its place in a storage.
#[derive(Clone, Debug, PartialEq)]
pub struct PickledTensor {
    pub kind: Kind,
    pub shape: Vec<i64>,
    pub(super) strides: Vec<i64>,
    pub(super) offset: i64,
    /// Key of the storage in the archive.
    pub(super) storage: Arc<str>,
}

impl PickledTensor {
    /// Returns the same tensor of another kind with elements of the same size.
    pub(super) fn of_kind(self, kind: Kind) -> Result<Self, String> {
        if self.kind.elt_size_in_bytes() != kind.elt_size_in_bytes() {
            return Err(format!("holds a tensor of {kind:?} in a storage of {:?}", self.kind));
        }
        Ok(PickledTensor { kind, ..self })
    }

    /// Checks the arguments of `_rebuild_tensor_v2`: storage, offset, shape, strides; the rest
    /// concerns autograd.
    pub(super) fn checked(
        storage: &Storage,
        offset: i64,
        shape: Vec<i64>,
        strides: Vec<i64>,
    ) -> Result<Self, String> {
        let place = || format!("{shape:?} with strides {strides:?} from element {offset} on");
        let axes = shape.len();
        if axes > MAX_AXES || strides.len() != axes {
            return Err(format!(
                "holds a tensor of {axes} axes and {} strides; expected as many, at most {MAX_AXES}",
                strides.len()
            ));
        }
        let elements = elements_of(&shape);
        let end = end_of(offset, &shape, &strides);
        let fits = |number: Option<u64>| number.is_some_and(|number| number <= storage.elements);
        if !fits(elements) || !fits(end) {
            return Err(format!(
                "holds a tensor {} in a storage of {} elements",
                place(),
                storage.elements
            ));
        }
        Ok(PickledTensor {
            kind: storage.kind,
            shape,
            strides,
            offset,
            storage: storage.key.clone(),
        })
    }
}

/// Returns the number of elements; `None` for a negative axis or a product beyond 63 bits.
fn elements_of(shape: &[i64]) -> Option<u64> {
    let checked = |product: i64, axis: &i64| {
        Some(*axis).filter(|axis| *axis >= 0).and_then(|axis| product.checked_mul(axis))
    };
    shape.iter().try_fold(1, checked)?.try_into().ok()
}

/// Returns the number of the element after the last one; `None` for negative numbers or overflow.
fn end_of(offset: i64, shape: &[i64], strides: &[i64]) -> Option<u64> {
    if offset < 0 || strides.iter().any(|stride| *stride < 0) {
        return None;
    }
    if shape.contains(&0) {
        return offset.try_into().ok();
    }
    let further = |last: i64, (axis, stride): (&i64, &i64)| {
        last.checked_add(axis.checked_sub(1)?.checked_mul(*stride)?)
    };
    let last = shape.iter().zip(strides).try_fold(offset, further)?;
    last.checked_add(1)?.try_into().ok()
}
