//! Places at which an operation rounds.

use tch::Kind;

/// Places at which an operation on bfloat16 rounds. Models were trained with either, and with 8
/// bits it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// After each operator of the formula, as a chain of libtorch's operators does.
    EachStep,
    /// At the end only: all intermediate numbers are float32.
    Once,
}

/// The kind in which numbers of `kind` are computed with: float64 for itself, float32 for all
/// others.
pub fn at_least_float(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}
