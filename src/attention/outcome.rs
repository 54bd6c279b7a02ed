//! Outcomes of trials.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::case::Case;
use crate::libtorch::AttentionBackend;

/// Relative errors of an attention's output and gradients: the norm of the difference from the
/// exact tensor over the norm of the exact one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Errors {
    pub output: f64,
    pub query: f64,
    pub key: f64,
    pub value: f64,
}

impl Errors {
    /// Output, then the gradients of query, key and value, with their names.
    pub fn named(&self) -> [(&'static str, f64); 4] {
        [
            ("output", self.output),
            ("gradient of the query", self.query),
            ("gradient of the key", self.key),
            ("gradient of the value", self.value),
        ]
    }

    /// The largest error of the three gradients.
    pub fn gradients(&self) -> f64 {
        self.query.max(self.key).max(self.value)
    }
}

/// Result of trying one backend on one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Forward and backward are as close to the exact numbers as their kind allows.
    Sound { errors: Errors, milliseconds: f64 },
    /// They are not; `why` names the tensor.
    Differs { errors: Errors, why: String },
    /// A number is NaN or infinite; `why` names the tensor.
    NotFinite { why: String },
    /// The backend does not compute such inputs.
    NotTaken,
    /// The process ended while it computed the case, or did not end in time.
    Ended { how: String },
    /// The process ended before it came to the case.
    NotReached,
    /// Memory ran out, or a signal from outside ended the process: nothing is known about the
    /// backend.
    Disturbed { how: String },
}

impl Outcome {
    pub fn is_sound(&self) -> bool {
        matches!(self, Outcome::Sound { .. })
    }

    /// Time of forward and backward of a sound backend.
    pub fn milliseconds(&self) -> Option<f64> {
        match self {
            Outcome::Sound { milliseconds, .. } => Some(*milliseconds),
            _ => None,
        }
    }

    /// True if another trial would have the same outcome.
    pub fn is_lasting(&self) -> bool {
        !matches!(self, Outcome::Disturbed { .. })
    }

    /// The backend's fault, if it has one.
    pub fn fault(&self) -> Option<String> {
        match self {
            Outcome::Sound { .. } | Outcome::NotTaken | Outcome::NotReached => None,
            Outcome::Differs { why, .. } => Some(why.clone()),
            Outcome::NotFinite { why } => Some(format!("{why} is not finite")),
            Outcome::Ended { how } | Outcome::Disturbed { how } => Some(how.clone()),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Sound { errors, milliseconds } => write!(
                f,
                "{milliseconds:.2} ms, off by {:.1e} and {:.1e}",
                errors.output,
                errors.gradients()
            ),
            Outcome::NotTaken => f.write_str("does not take it"),
            Outcome::NotReached => f.write_str("not tried"),
            wrong => f.write_str(&wrong.fault().unwrap_or_default()),
        }
    }
}

/// One backend's outcome in one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    pub backend: AttentionBackend,
    pub case: Case,
    pub outcome: Outcome,
}
