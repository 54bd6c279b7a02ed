//! The kinds in which a step joins, sends and keeps gradients.

use tch::Kind;

use crate::parallel::{ReduceDtype, Sharding};

/// What happens to a stage's gradients between its backward and the optimizer, on which their kinds
/// depend: they are widened only where something is added to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joining {
    /// True if a rank adds up several micro-batches.
    adds: bool,
    /// True if it does so before anything is sent.
    adds_first: bool,
    /// The kind in which gradients of bfloat16 parameters travel; `None` if this rank is alone.
    sent: Option<ReduceDtype>,
}

impl Default for Joining {
    /// Gradients that others may be added to.
    fn default() -> Self {
        Joining { adds: true, adds_first: true, sent: None }
    }
}

impl Joining {
    /// For a step of this many micro-batches on each of `ranks`.
    pub fn new(ranks: usize, sharding: Sharding, dtype: ReduceDtype, micro_batches: usize) -> Self {
        let sent = (ranks > 1).then_some(dtype);
        let adds = micro_batches > 1;
        let scatters_each = sent.is_some() && sharding.scatters_each_micro_batch();
        Joining { adds, adds_first: adds && !scatters_each, sent }
    }

    /// The kind in which the gradients of parameters of `kind` are joined.
    pub fn joined(self, kind: Kind) -> Kind {
        if self.adds_first { summed(kind) } else { self.sent(kind) }
    }

    /// The kind in which they travel between ranks; their own, if this rank is alone.
    pub fn sent(self, kind: Kind) -> Kind {
        match self.sent {
            Some(dtype) => dtype.kind(kind),
            None if self.adds_first => summed(kind),
            None => kind,
        }
    }

    /// The kind in which the optimizer gets them.
    pub fn kept(self, kind: Kind) -> Kind {
        if self.adds && !self.adds_first { summed(kind) } else { self.sent(kind) }
    }
}

impl ReduceDtype {
    /// The kind in which gradients of parameters of `kind` are reduced; precise ones are always
    /// reduced in f32.
    fn kind(self, kind: Kind) -> Kind {
        match self {
            ReduceDtype::BFloat16 if kind != Kind::Float => Kind::BFloat16,
            _ => Kind::Float,
        }
    }
}

/// The kind in which gradients are added up.
fn summed(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

#[cfg(test)]
mod tests {
    use super::*;

    use Kind::{BFloat16, Float};
    use ReduceDtype::{BFloat16 as Narrow, Float32 as Wide};

    /// Kinds of gradients of bfloat16 parameters: joined, sent, kept.
    fn kinds(
        ranks: usize,
        sharding: Sharding,
        dtype: ReduceDtype,
        micro_batches: usize,
    ) -> [Kind; 3] {
        let joining = Joining::new(ranks, sharding, dtype, micro_batches);
        [joining.joined(BFloat16), joining.sent(BFloat16), joining.kept(BFloat16)]
    }

    #[test]
    fn a_gradient_that_nobody_adds_to_keeps_its_kind() {
        assert_eq!(kinds(1, Sharding::None, Wide, 1), [BFloat16; 3]);
        assert_eq!(kinds(8, Sharding::None, Narrow, 1), [BFloat16; 3]);
        assert_eq!(kinds(8, Sharding::Gradients, Narrow, 1), [BFloat16; 3]);
    }

    #[test]
    fn sums_are_in_float32() {
        for sharding in [Sharding::None, Sharding::Gradients] {
            assert_eq!(kinds(1, sharding, Narrow, 2), [Float; 3]);
            assert_eq!(kinds(8, sharding, Wide, 1), [Float; 3]);
            assert_eq!(kinds(8, sharding, Wide, 2), [Float; 3]);
        }
        assert_eq!(kinds(8, Sharding::Optimizer, Narrow, 2), [Float, BFloat16, BFloat16]);
        assert_eq!(kinds(8, Sharding::Gradients, Narrow, 2), [BFloat16, BFloat16, Float]);
    }

    #[test]
    fn precise_parameters_have_precise_gradients() {
        let joining = Joining::new(8, Sharding::None, Narrow, 1);
        assert_eq!([joining.joined(Float), joining.sent(Float), joining.kept(Float)], [Float; 3]);
        assert_eq!(Joining::default().joined(Kind::Double), Kind::Double);
    }
}
