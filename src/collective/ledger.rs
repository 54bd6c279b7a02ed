//! The operations that a rank has issued: ranks compare them to check that they are in step.

use std::cell::Cell;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use tch::{Kind, Tensor};

use super::ReduceOp;
use crate::pulse;

/// The properties of one operation that must be equal on all ranks. Shapes do not matter, only
/// kinds and numbers of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Signature {
    operation: &'static str,
    op: Option<ReduceOp>,
    root: Option<usize>,
    tensors: usize,
    /// Elements of all tensors together.
    elements: usize,
    /// Kind of the first tensor; `None` without tensors.
    kind: Option<Kind>,
    /// Hash over the kind and the number of elements of each tensor.
    forms: u64,
}

impl Signature {
    /// The signature of an operation on `tensors`; for sliced tensors pass the full ones.
    pub(super) fn new<'t>(
        operation: &'static str,
        tensors: impl IntoIterator<Item = &'t Tensor>,
    ) -> Self {
        let mut signature = Signature {
            operation,
            op: None,
            root: None,
            tensors: 0,
            elements: 0,
            kind: None,
            forms: 0,
        };
        let mut forms = DefaultHasher::new();
        for tensor in tensors {
            let (kind, elements) = (tensor.kind(), tensor.numel());
            (kind, elements).hash(&mut forms);
            signature.kind.get_or_insert(kind);
            signature.tensors += 1;
            signature.elements += elements;
        }
        signature.forms = forms.finish();
        signature
    }

    pub(super) fn reduced_by(self, op: ReduceOp) -> Self {
        Signature { op: Some(op), ..self }
    }

    pub(super) fn rooted_at(self, root: usize) -> Self {
        Signature { root: Some(root), ..self }
    }
}

impl fmt::Display for Signature {
    /// Writes `Sum of 4096 Float`; nothing for an operation without tensors.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(kind) = self.kind else { return Ok(()) };
        if let Some(op) = self.op {
            write!(f, "{op:?} of ")?;
        }
        match self.tensors {
            1 => write!(f, "{} {kind:?}", self.elements)?,
            tensors => {
                write!(f, "{tensors} tensors, {} elements, the first {kind:?}", self.elements)?
            }
        }
        self.root.map_or(Ok(()), |root| write!(f, " from rank {root}"))
    }
}

/// The number of operations that a rank has issued on one communicator, and a digest of them. Equal
/// on all ranks that are in step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Issued {
    pub count: u64,
    /// Hash over all signatures in order. Ranks of one build compute equal digests.
    pub digest: u64,
    pub last: Option<Signature>,
}

impl fmt::Display for Issued {
    /// Writes the last operation: `all_reduce#8 (Sum of 4096 Float)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(last) = self.last else { return f.write_str("no operation") };
        write!(f, "{}#{}", last.operation, self.count)?;
        if last.tensors > 0 { write!(f, " ({last})") } else { Ok(()) }
    }
}

/// Counts the operations of one communicator in the order of their calls.
#[derive(Debug, Default)]
pub(super) struct Ledger(Cell<Issued>);

impl Ledger {
    /// Records an operation. The returned state includes it and identifies it.
    pub fn enter(&self, signature: Signature) -> Issued {
        let before = self.0.get();
        let mut digest = DefaultHasher::new();
        (before.digest, signature).hash(&mut digest);
        let issued =
            Issued { count: before.count + 1, digest: digest.finish(), last: Some(signature) };
        self.0.set(issued);
        pulse::begin_collective();
        issued
    }

    pub fn issued(&self) -> Issued {
        self.0.get()
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn floats(size: i64) -> Tensor {
        Tensor::zeros([size], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn an_operation_is_named_with_its_number() {
        let ledger = Ledger::default();
        assert_eq!(ledger.issued().to_string(), "no operation");
        let sum =
            ledger.enter(Signature::new("all_reduce", [&floats(4096)]).reduced_by(ReduceOp::Sum));
        assert_eq!(sum.to_string(), "all_reduce#1 (Sum of 4096 Float)");
        assert_eq!(
            ledger.enter(Signature::new("broadcast", [&floats(3)]).rooted_at(2)).to_string(),
            "broadcast#2 (3 Float from rank 2)"
        );
        assert_eq!(ledger.enter(Signature::new("barrier", [])).to_string(), "barrier#3");
        let both = ledger.enter(Signature::new("all_gather", [&floats(3), &floats(4)]));
        assert_eq!(both.to_string(), "all_gather#4 (2 tensors, 7 elements, the first Float)");
        assert_eq!(ledger.issued(), both);
    }

    #[test]
    fn a_digest_tells_every_difference_and_every_order_apart() {
        let digest = |signatures: &[Signature]| {
            let ledger = Ledger::default();
            for signature in signatures {
                ledger.enter(*signature);
            }
            ledger.issued().digest
        };
        let sum = Signature::new("all_reduce", [&floats(3), &floats(4)]).reduced_by(ReduceOp::Sum);
        let others = [
            Signature::new("all_reduce", [&floats(4), &floats(3)]).reduced_by(ReduceOp::Sum),
            Signature::new("all_reduce", [&floats(3), &floats(4)]).reduced_by(ReduceOp::Max),
            Signature::new("all_reduce", [&floats(3), &floats(4).to_kind(Kind::Double)])
                .reduced_by(ReduceOp::Sum),
            Signature::new("all_gather", [&floats(3), &floats(4)]),
            Signature::new("broadcast", [&floats(7)]).rooted_at(0),
            Signature::new("broadcast", [&floats(7)]).rooted_at(1),
            Signature::new("barrier", []),
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(digest(&[sum]), digest(&[*other]), "{other:?}");
            assert_ne!(digest(&[sum, *other]), digest(&[*other, sum]), "{other:?}");
            assert!(
                others[..index].iter().all(|earlier| digest(&[*earlier]) != digest(&[*other])),
                "{other:?}"
            );
        }
        assert_eq!(digest(&[sum, others[0]]), digest(&[sum, others[0]]));
    }
}
