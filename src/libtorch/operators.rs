//! Counts of the operators that run, and of the bytes that they move.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ffi;

/// Operators that make a view of a tensor or take memory, and compute and move no numbers.
const IDLE: [&str; 30] = [
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "detach_",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "resize_",
    "select",
    "set_",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsafe_split",
    "unsqueeze",
    "view",
    "view_as_complex",
    "view_as_real",
];
/// Operators that write their first input without reading it.
const OVERWRITING: [&str; 5] = ["copy_", "fill_", "normal_", "uniform_", "zero_"];
/// Beginning of the names of libtorch's own operators.
const PREFIX: &str = "aten::";
/// Beginnings of the names of matrix products and of attention.
const COMPUTING: [&str; 6] =
    ["_scaled_dot_product", "addmm", "baddbmm", "bmm", "convolution", "mm"];

/// The operators that ran, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operators {
    /// libtorch's.
    pub theirs: BTreeMap<String, Ran>,
    /// Single passes of our own.
    pub ours: BTreeMap<&'static str, Ran>,
}

/// How often an operator ran, and the bytes that it read and wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    pub times: u64,
    pub bytes: u64,
}

impl Ran {
    fn add(&mut self, other: Ran) {
        self.times += other.times;
        self.bytes += other.bytes;
    }
}

impl FromIterator<Ran> for Ran {
    fn from_iter<I: IntoIterator<Item = Ran>>(all: I) -> Self {
        let mut sum = Ran::default();
        all.into_iter().for_each(|ran| sum.add(ran));
        sum
    }
}

impl Operators {
    /// libtorch's operators that are neither matrix products nor attention.
    pub fn between_products(&self) -> Ran {
        let computes = |name: &str| COMPUTING.iter().any(|computing| name.starts_with(computing));
        self.theirs.iter().filter(|(name, _)| !computes(name)).map(|(_, ran)| *ran).collect()
    }
}

/// The counts of a [`count_operators`] that runs; `None` if none does.
static COUNTS: Mutex<Option<Operators>> = Mutex::new(None);
static IS_COUNTING: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// True within [`as_one`].
    static IS_WITHIN: Cell<bool> = const { Cell::new(false) };
}

/// Counts the operators that run in `body` on any thread: libtorch's that have kernels, not what
/// these call, and none that only make a view or take memory; and those of [`as_one`]. A GPU has a
/// launch or a few for each.
pub fn count_operators<T>(body: impl FnOnce() -> T) -> (T, Operators) {
    *counts() = Some(Operators::default());
    IS_COUNTING.store(true, Ordering::Relaxed);
    ffi::fm_dist_watch_operators(Some(seen));
    let value = body();
    ffi::fm_dist_watch_operators(None);
    IS_COUNTING.store(false, Ordering::Relaxed);
    (value, counts().take().unwrap_or_default())
}

/// True while operators are counted.
pub fn is_counting() -> bool {
    IS_COUNTING.load(Ordering::Relaxed)
}

/// Runs a pass of our own, which moves `bytes`. Where operators are counted, it is one, and
/// libtorch's that `body` calls on this thread are none: on a GPU it is a kernel.
pub fn as_one<T>(name: &'static str, bytes: impl FnOnce() -> u64, body: impl FnOnce() -> T) -> T {
    if !is_counting() {
        return body();
    }
    let was_within = IS_WITHIN.replace(true);
    let value = body();
    IS_WITHIN.set(was_within);
    let ran = Ran { times: 1, bytes: bytes() };
    if let Some(counts) = &mut *counts() {
        counts.ours.entry(name).or_default().add(ran);
    }
    value
}

fn counts() -> MutexGuard<'static, Option<Operators>> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[allow(unsafe_code)]
extern "C" fn seen(name: *const c_char, read: u64, written: u64) {
    if IS_WITHIN.get() {
        return;
    }
    // SAFETY: the shim gives a text with a zero at its end, which lives through the call.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    let Some(own) = name.strip_prefix(PREFIX).filter(|own| !IDLE.contains(own)) else { return };
    if let Some(counts) = &mut *counts() {
        let ran = Ran { times: 1, bytes: moved(own, read, written) };
        counts.theirs.entry(own.into()).or_default().add(ran);
    }
}

/// Bytes that an operator moves, from those of its inputs and of its outputs.
fn moved(name: &str, read: u64, written: u64) -> u64 {
    let overwritten = if OVERWRITING.contains(&name) { written } else { 0 };
    (read + written).saturating_sub(overwritten)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    /// Tests that count take turns: counts are those of the whole process.
    static TURN: Mutex<()> = Mutex::new(());

    fn counted(body: impl FnOnce()) -> Operators {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        count_operators(body).1
    }

    #[test]
    fn operators_that_compute_are_counted_and_views_are_not() {
        let x = Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let counts = counted(|| (x.tr().matmul(&x) + 1.0).sum(Kind::Float).backward()).theirs;
        let of = |name: &str| counts.get(name).map_or(0, |ran| ran.times);
        // Other tests may compute meanwhile.
        assert!(of("mm") >= 3 && of("add") >= 1 && of("sum") >= 1, "{counts:?}");
        assert!(!counts.contains_key("t") && !counts.contains_key("matmul"), "{counts:?}");
    }

    #[test]
    fn bytes_are_those_that_are_read_and_written() {
        let x = Tensor::ones([8, 3], (Kind::Float, Device::Cpu));
        // Operators that no other test needs.
        let counts = counted(|| {
            drop(x.narrow(1, 0, 1).expand([8, 50], false).erfinv());
            drop(x.shallow_clone().lgamma_());
        });
        assert_eq!(counts.theirs["erfinv"], Ran { times: 1, bytes: 4 * (8 + 400) });
        assert_eq!(counts.theirs["lgamma_"], Ran { times: 1, bytes: 4 * 2 * 24 });
    }

    #[test]
    fn products_and_attention_are_not_between_products() {
        let ran = |bytes| Ran { times: 1, bytes };
        let names = ["mm", "_scaled_dot_product_flash_attention", "add", "cat"];
        let theirs = names.map(str::to_owned).into_iter().zip([1, 2, 4, 8].map(ran)).collect();
        let operators = Operators { theirs, ..Operators::default() };
        assert_eq!(operators.between_products(), Ran { times: 2, bytes: 12 });
    }

    #[test]
    fn what_is_written_without_being_read_counts_once() {
        // 8 bytes of the first input, which is the output, and 4 of a second one.
        assert_eq!([moved("copy_", 12, 8), moved("add_", 12, 8)], [12, 20]);
        assert_eq!([moved("zero_", 8, 8), moved("_foreach_copy_", 16, 0)], [8, 16]);
    }

    #[test]
    fn a_pass_of_our_own_is_one_operator_whatever_it_is_made_of() {
        let x = Tensor::ones([3], (Kind::Float, Device::Cpu));
        let counts = counted(|| as_one("mine", || 7, || drop(x.digamma())));
        assert_eq!(counts.ours, BTreeMap::from([("mine", Ran { times: 1, bytes: 7 })]));
        assert!(!counts.theirs.contains_key("digamma"), "{counts:?}");
        as_one("mine", || panic!("nobody asks"), || ());
    }
}
