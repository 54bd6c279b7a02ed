//! The choice of a process between single passes and libtorch's operators, and a count of the
//! operations that fell back.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tch::Device;

use super::{Misfit, Pass};
use crate::settings::Choice;

/// `[compute] kernels`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernels {
    /// A single pass wherever one exists and takes the inputs.
    #[default]
    Fused,
    /// libtorch's operators throughout.
    Plain,
}

impl Choice for Kernels {
    const ALL: &'static [(&'static str, Self)] =
        &[("fused", Kernels::Fused), ("plain", Kernels::Plain)];
}

/// libtorch's threads for which single passes were allowed: [`PLAIN`] if they were not, and
/// [`UNDECIDED`] before the first operation.
static THREADS: AtomicI32 = AtomicI32::new(UNDECIDED);
const UNDECIDED: i32 = -1;
const PLAIN: i32 = 0;

/// Operations that a single pass took.
static TAKEN: AtomicU64 = AtomicU64::new(0);
/// Operations that fell back, by name and reason.
static FALLEN_BACK: Mutex<BTreeMap<(&'static str, Misfit), u64>> = Mutex::new(BTreeMap::new());

/// Chooses for the whole process how operations are computed from now on.
///
/// # Ordering
/// To be called before the first operation and after libtorch's number of threads was set: it is
/// read here, and not with each operation. A program that never calls it has
/// [`Kernels::Fused`].
pub fn choose(kernels: Kernels) {
    let threads = match kernels {
        Kernels::Fused => tch::get_num_threads().max(1),
        Kernels::Plain => PLAIN,
    };
    THREADS.store(threads, Ordering::Relaxed);
}

fn threads() -> i32 {
    if THREADS.load(Ordering::Relaxed) == UNDECIDED {
        choose(Kernels::default());
    }
    THREADS.load(Ordering::Relaxed)
}

/// The single passes that the process takes on `device`.
pub fn pass_on(device: Device) -> Option<Pass> {
    allowed(threads(), device).ok()
}

/// The single passes of `device`, or the reason for taking none.
fn allowed(threads: i32, device: Device) -> Result<Pass, String> {
    let pass = Pass::on(device);
    match (threads, pass) {
        (PLAIN, _) => Err("compute.kernels = \"plain\"".into()),
        // A single pass runs on the calling thread alone.
        (2.., Some(Pass::Cpu)) => Err(format!(
            "they divide their work among parallel.num_threads = {threads}, a single pass does not"
        )),
        (_, Some(pass)) => Ok(pass),
        (_, None) => Err(format!("there is no single pass for {device:?}")),
    }
}

/// Says for the log how operations are computed on `device`.
pub fn way(device: Device) -> String {
    match allowed(threads(), device) {
        Ok(Pass::Cpu) => "operations in a single pass over memory each, on one thread".into(),
        Err(why) => format!("operations by libtorch's operators: {why}"),
    }
}

/// Counts an operation that a single pass took, or did not.
pub fn count(name: &'static str, misfit: Option<Misfit>) {
    match misfit {
        None => drop(TAKEN.fetch_add(1, Ordering::Relaxed)),
        Some(misfit) => *fallen_back().entry((name, misfit)).or_default() += 1,
    }
}

fn fallen_back() -> std::sync::MutexGuard<'static, BTreeMap<(&'static str, Misfit), u64>> {
    FALLEN_BACK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says for the log how many operations of this process fell back to libtorch's operators, and why;
/// none if single passes were not taken at all, which [`way`] says.
pub fn fallbacks() -> Option<String> {
    told(TAKEN.load(Ordering::Relaxed), &fallen_back())
}

fn told(taken: u64, fallen_back: &BTreeMap<(&'static str, Misfit), u64>) -> Option<String> {
    let fallen: u64 = fallen_back.values().sum();
    let all = taken + fallen;
    if fallen == 0 {
        return (all > 0).then(|| format!("{all} operations, each in a single pass"));
    }
    let lines: Vec<String> = fallen_back
        .iter()
        .map(|((name, misfit), count)| format!("{name} {count} ({})", misfit.words()))
        .collect();
    Some(format!(
        "{fallen} of {all} operations fell back to libtorch's operators: {}",
        lines.join(", ")
    ))
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

    #[test]
    fn a_cpu_with_one_thread_takes_single_passes() {
        assert_eq!(allowed(1, Device::Cpu), Ok(Pass::Cpu));
    }

    #[test]
    fn what_is_not_taken_has_its_reason() {
        for (threads, device, words) in [
            (PLAIN, Device::Cpu, "compute.kernels = \"plain\""),
            (PLAIN, Device::Cuda(0), "compute.kernels = \"plain\""),
            (4, Device::Cpu, "they divide their work among parallel.num_threads = 4, a single"),
            (4, Device::Cuda(1), "there is no single pass for Cuda(1)"),
            (1, Device::Cuda(1), "there is no single pass for Cuda(1)"),
        ] {
            let why = allowed(threads, device).expect_err("plain operators");
            assert!(why.starts_with(words), "{threads} {device:?}: {why}");
        }
    }

    #[test]
    fn what_fell_back_is_told_by_operation_and_reason() {
        assert_eq!(told(0, &BTreeMap::new()), None);
        assert_eq!(
            told(12, &BTreeMap::new()).as_deref(),
            Some("12 operations, each in a single pass")
        );
        let fallen =
            BTreeMap::from([(("rms_norm", Misfit::Shape), 3), (("gelu_tanh", Misfit::Kind), 1)]);
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
