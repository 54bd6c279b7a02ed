//! Own kernels on GPUs, verified before anything is computed with them.

use std::collections::BTreeSet;

use tch::Device;

use crate::collective::Collective;
use crate::collective::agreement::agree;
use crate::error::Result;
use crate::flow::Note;
use crate::ops::{self, Kernels, Unfit};

/// An operation and the reason why a rank cannot take its kernels.
type Refused = (String, String);

/// Compares the kernels of this rank's GPU with libtorch's operators. Those that are wrong on any
/// rank are left out on all of them, because ranks that round differently would part. Returns a
/// warning for each.
///
/// # Errors
/// Errors of the agreement.
///
/// # Ordering
/// Every rank of `world` calls it, after its process has [chosen](ops::choose) how operations are
/// computed and before the first one.
pub fn verify_kernels(
    kernels: Kernels,
    device: Device,
    world: &dyn Collective,
) -> Result<Vec<Note>> {
    if kernels == Kernels::Plain || !device.is_cuda() {
        return Ok(Vec::new());
    }
    let refused = |Unfit { operation, what }| (operation.to_string(), what);
    let own: Vec<Refused> = ops::verify(device).unfit.into_iter().map(refused).collect();
    left_out_on_all(&own, world)
}

fn left_out_on_all(own: &[Refused], world: &dyn Collective) -> Result<Vec<Note>> {
    let own = serde_json::to_string(own).expect("texts are JSON");
    let mut operations = BTreeSet::new();
    let mut warnings = Vec::new();
    for (rank, told) in agree(Ok(own), world)?.iter().enumerate() {
        let refused: Vec<Refused> = serde_json::from_str(told).expect("a rank's own words");
        for (operation, what) in refused {
            if operations.insert(operation.clone()) {
                warnings.push(Note::Warning(format!(
                    "libtorch's operators take the place of our kernels for {operation} on all ranks: rank {rank}: {what}"
                )));
            }
        }
    }
    ops::leave_out(operations);
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Solo;

    #[test]
    fn each_operation_is_told_once_with_its_reason() {
        let refused = |operation: &str, what: &str| (operation.to_string(), what.to_string());
        let own = [refused("broken", "is off by 1"), refused("broken", "is off by 2")];
        let warnings = left_out_on_all(&own, &Solo).expect("one rank agrees");
        let told: Vec<String> = warnings.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 1);
        assert!(told[0].ends_with("for broken on all ranks: rank 0: is off by 1"), "{}", told[0]);
        assert!(left_out_on_all(&[], &Solo).expect("one rank agrees").is_empty());
    }
}
