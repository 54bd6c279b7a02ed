//! The identity of a run's frozen parameters, which are in no checkpoint of it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::files::sha256::hex;

/// Letters of a fingerprint that a message shows.
const SHOWN: usize = 12;

/// The frozen parameters of a run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// The folder that they were read from; `None` if they were drawn.
    pub path: Option<String>,
    /// A hash that tells them from others, wherever they lie.
    pub fingerprint: String,
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = self.fingerprint.get(..SHOWN).unwrap_or(&self.fingerprint);
        match &self.path {
            Some(path) => write!(f, "those of {path} (fingerprint {short})"),
            None => write!(f, "drawn (fingerprint {short})"),
        }
    }
}

/// Fingerprint of named tensors, whatever their order and the kind in which they were stored.
#[derive(Debug, Default)]
pub struct Fingerprint {
    /// By name, the sum of the bits of all values in f32.
    sums: BTreeMap<String, i64>,
}

impl Fingerprint {
    /// Adds a tensor, on the CPU.
    pub fn add(&mut self, name: &str, values: &Tensor) {
        // One pass at the speed of memory: weights are too large to be hashed at every start.
        let flat = values.to_kind(Kind::Float).flatten(0, -1).contiguous();
        let words = match flat.numel() % 2 {
            // libtorch copies before it sums narrower types.
            0 if (flat.data_ptr() as usize).is_multiple_of(8) => flat.view_dtype(Kind::Int64),
            0 => flat.copy().view_dtype(Kind::Int64),
            _ => flat.view_dtype(Kind::Int),
        };
        self.sums.insert(name.into(), words.sum(Kind::Int64).int64_value(&[]));
    }

    pub fn text(&self) -> String {
        let lines = self.sums.iter().map(|(name, sum)| format!("{name} {sum}\n"));
        hex(Sha256::new_with_prefix(lines.collect::<String>()))
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn text(tensors: &[(&str, &Tensor)]) -> String {
        let mut fingerprint = Fingerprint::default();
        tensors.iter().for_each(|(name, tensor)| fingerprint.add(name, tensor));
        fingerprint.text()
    }

    #[test]
    fn weights_are_known_by_their_values_and_names_and_not_by_order_or_kind() {
        let a = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let b = Tensor::ones([4], (Kind::Float, Device::Cpu));
        let known = text(&[("a", &a), ("b", &b)]);
        assert_eq!(known, text(&[("b", &b.to_kind(Kind::BFloat16)), ("a", &a)]));
        let changed = &b + 1e-6;
        assert_ne!(known, text(&[("a", &a), ("b", &changed)]));
        assert_ne!(known, text(&[("b", &a), ("a", &b)]));
    }
}
