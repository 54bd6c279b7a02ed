//! The choice of a process between single passes and libtorch's operators, and a count of the
//! operations that fell back.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::Device;

use super::{Misfit, Pass};
use crate::settings::choice;

choice! {
    /// `[compute] kernels`.
    pub enum Kernels {
        /// A single pass wherever one exists and takes the inputs.
        "fused" => Fused,
        /// libtorch's operators throughout.
        "plain" => Plain,
    }
}

impl Kernels {
    /// Returns what a process takes that was told to take these, on `device` and with so many of
    /// libtorch's threads.
    pub fn taken(self, device: Device, threads: i32) -> Self {
        let decision = Decision { kernels: self, threads, left_out: Vec::new() };
        if decision.pass_on(device).is_ok() { Kernels::Fused } else { Kernels::Plain }
    }
}

/// Conditions under which a process computes its operations.
struct Decision {
    kernels: Kernels,
    /// Threads among which libtorch's operators divide their work.
    threads: i32,
    /// Operations whose single pass on a GPU is not taken.
    left_out: Vec<String>,
}

/// Unset before the first operation.
static DECISION: Mutex<Option<Decision>> = Mutex::new(None);

/// Operations of the process.
static COUNTS: Mutex<Counts> = Mutex::new(Counts::NONE);

struct Counts {
    /// Operations that a single pass took.
    taken: u64,
    fallen_back: BTreeMap<Fallback, u64>,
}

/// An operation that libtorch's operators took in the place of a single pass.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Fallback {
    operation: &'static str,
    reason: Misfit,
}

/// Chooses for the whole process how operations are computed, and counts them, from now on.
///
/// # Ordering
/// To be called before the first operation of a model and after libtorch's number of threads was
/// set: it is read here, and not with each operation. A program that never calls it, and one that
/// tries its data first, has [`Kernels::Fused`] until then.
pub fn choose(kernels: Kernels) {
    *held(&DECISION) = Some(Decision::now(kernels));
    *held(&COUNTS) = Counts::NONE;
}

/// Leaves out the single passes of these operations on GPUs: [`verify`](super::verify) found them
/// to be wrong, here or on another rank.
pub fn leave_out(operations: impl IntoIterator<Item = String>) {
    decided(|decision| decision.left_out.extend(operations));
}

/// The single pass of an operation that the process takes on `device`.
pub fn pass_of(operation: &'static str, device: Device) -> Option<Pass> {
    decided(|decision| decision.pass_of(operation, device))
}

fn decided<T>(ask: impl FnOnce(&mut Decision) -> T) -> T {
    ask(held(&DECISION).get_or_insert_with(|| Decision::now(Kernels::Fused)))
}

/// A panic of another thread leaves no broken state behind.
fn held<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Decision {
    fn now(kernels: Kernels) -> Self {
        Decision { kernels, threads: tch::get_num_threads(), left_out: Vec::new() }
    }

    fn pass_of(&self, operation: &'static str, device: Device) -> Option<Pass> {
        let pass = self.pass_on(device).ok()?;
        let is_left_out =
            pass == Pass::Cuda && self.left_out.iter().any(|left_out| left_out == operation);
        (!is_left_out).then_some(pass)
    }

    /// The single passes of `device`, or the reason for taking none. Asked with each operation, so
    /// that words for the reason are made elsewhere.
    fn pass_on(&self, device: Device) -> Result<Pass, Refusal> {
        match (self.kernels, Pass::on(device)) {
            (Kernels::Plain, _) => Err(Refusal::Configured),
            (Kernels::Fused, None) => Err(Refusal::NoPass(device)),
            // A single pass runs on the calling thread alone.
            (Kernels::Fused, Some(Pass::Cpu)) if self.threads > 1 => {
                Err(Refusal::Threads(self.threads))
            }
            (Kernels::Fused, Some(pass)) => Ok(pass),
        }
    }
}

/// Reason for which a process takes no single passes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Refusal {
    Configured,
    NoPass(Device),
    /// Number of libtorch's threads.
    Threads(i32),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Configured => write!(f, "compute.kernels = \"plain\""),
            Refusal::NoPass(device) => write!(f, "there is no single pass for {device:?}"),
            Refusal::Threads(threads) => write!(
                f,
                "they divide their work among parallel.num_threads = {threads}, a single pass does not"
            ),
        }
    }
}

/// Says for the log how operations are computed on `device`.
pub fn way(device: Device) -> String {
    decided(|decision| match decision.pass_on(device) {
        Ok(Pass::Cpu) => "operations in a single pass over memory each, on one thread".into(),
        Ok(Pass::Cuda) if decision.left_out.is_empty() => {
            "operations in a single pass over memory each, by own kernels".into()
        }
        Ok(Pass::Cuda) => format!(
            "operations in a single pass over memory each, by own kernels; left to libtorch's operators: {}",
            decision.left_out.join(", ")
        ),
        Err(why) => format!("operations by libtorch's operators: {why}"),
    })
}

/// Counts an operation that a single pass took, or did not for a reason.
pub fn count(operation: &'static str, misfit: Option<Misfit>) {
    let mut counts = held(&COUNTS);
    match misfit {
        None => counts.taken += 1,
        Some(reason) => *counts.fallen_back.entry(Fallback { operation, reason }).or_default() += 1,
    }
}

/// Says for the log how many operations of this process fell back to libtorch's operators, and why;
/// none if single passes were not taken at all, which [`way`] says.
pub fn fallbacks() -> Option<String> {
    held(&COUNTS).told()
}

impl Counts {
    const NONE: Self = Counts { taken: 0, fallen_back: BTreeMap::new() };

    fn told(&self) -> Option<String> {
        let fallen: u64 = self.fallen_back.values().sum();
        let all = self.taken + fallen;
        if fallen == 0 {
            return (all > 0).then(|| format!("{all} operations, each in a single pass"));
        }
        let told = |(fallback, count): (&Fallback, &u64)| {
            format!("{} {count} ({})", fallback.operation, fallback.reason.words())
        };
        let told: Vec<String> = self.fallen_back.iter().map(told).collect();
        let told = told.join(", ");
        Some(format!("{fallen} of {all} operations fell back to libtorch's operators: {told}"))
    }
}

impl Misfit {
    fn words(self) -> &'static str {
        match self {
            Misfit::Kind => "a kind that its single pass does not know",
            Misfit::Shape => "a shape that its single pass does not know",
            Misfit::Empty => "no numbers",
            Misfit::Devices => "inputs on several devices",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use Kernels::{Fused, Plain};

    fn decision(kernels: Kernels, threads: i32) -> Decision {
        Decision { kernels, threads, left_out: Vec::new() }
    }

    #[test]
    fn a_gpu_takes_kernels_but_those_that_are_left_out() {
        let mut decision = decision(Fused, 4);
        let gpu = Device::Cuda(1);
        assert_eq!(decision.pass_of("rotation", gpu), Some(Pass::Cuda));
        decision.left_out.push("rotation".into());
        assert_eq!(decision.pass_of("rotation", gpu), None);
        assert_eq!(decision.pass_of("gelu_tanh", gpu), Some(Pass::Cuda));
        decision.threads = 1;
        assert_eq!(decision.pass_of("rotation", Device::Cpu), Some(Pass::Cpu));
    }

    #[test]
    fn a_cpu_with_one_thread_takes_single_passes() {
        assert_eq!(decision(Fused, 1).pass_on(Device::Cpu), Ok(Pass::Cpu));
        assert_eq!([1, 2].map(|threads| Fused.taken(Device::Cpu, threads)), [Fused, Plain]);
        assert_eq!(Fused.taken(Device::Cuda(0), 2), Fused);
        assert_eq!(Plain.taken(Device::Cpu, 1), Plain);
    }

    #[test]
    fn what_is_not_taken_has_its_reason() {
        for (kernels, threads, device, words) in [
            (Plain, 1, Device::Cpu, "compute.kernels = \"plain\""),
            (Plain, 4, Device::Cuda(0), "compute.kernels = \"plain\""),
            (Fused, 4, Device::Cpu, "they divide their work among parallel.num_threads = 4,"),
            (Fused, 4, Device::Mps, "there is no single pass for Mps"),
        ] {
            let why = decision(kernels, threads).pass_on(device).expect_err("plain operators");
            let why = why.to_string();
            assert!(why.starts_with(words), "{kernels:?} {threads} {device:?}: {why}");
        }
    }

    #[test]
    fn what_fell_back_is_told_by_operation_and_reason() {
        let told = |taken, fallen: &[(&'static str, Misfit, u64)]| {
            let fallen_back = fallen
                .iter()
                .map(|&(operation, reason, count)| (Fallback { operation, reason }, count))
                .collect();
            Counts { taken, fallen_back }.told()
        };
        assert_eq!(told(0, &[]), None);
        assert_eq!(told(12, &[]).as_deref(), Some("12 operations, each in a single pass"));
        let fallen = [("rms_norm", Misfit::Shape, 3), ("gelu_tanh", Misfit::Kind, 1)];
        assert_eq!(
            told(12, &fallen).as_deref(),
            Some(
                "4 of 16 operations fell back to libtorch's operators: \
                 gelu_tanh 1 (a kind that its single pass does not know), \
                 rms_norm 3 (a shape that its single pass does not know)"
            )
        );
    }
}
