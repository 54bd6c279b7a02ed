//! Counts of the operators that libtorch runs.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::sync::{Mutex, PoisonError};

use super::ffi;

/// Operators that make a view of a tensor or take memory, and compute and move no numbers.
const IDLE: [&str; 29] = [
    "_reshape_alias",
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
/// Beginning of the names of libtorch's own operators.
const PREFIX: &str = "aten::";

/// The counts of a [`count_operators`] that runs.
static COUNTS: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

/// Counts the operators that libtorch runs in `body` on any thread, by name: those that have kernels,
/// not what these call, and none that only make a view or take memory. A GPU has a launch or a few
/// for each.
pub fn count_operators<T>(body: impl FnOnce() -> T) -> (T, BTreeMap<String, u64>) {
    std::mem::take(&mut *counts());
    ffi::fm_dist_watch_operators(Some(seen));
    let value = body();
    ffi::fm_dist_watch_operators(None);
    (value, std::mem::take(&mut *counts()))
}

fn counts() -> std::sync::MutexGuard<'static, BTreeMap<String, u64>> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[allow(unsafe_code)]
extern "C" fn seen(name: *const c_char) {
    // SAFETY: the shim gives a text with a zero at its end, which lives through the call.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    if let Some(own) = name.strip_prefix(PREFIX).filter(|own| !IDLE.contains(own)) {
        *counts().entry(own.into()).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn operators_that_compute_are_counted_and_views_are_not() {
        let x = Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let body = || (x.tr().matmul(&x) + 1.0).sum(Kind::Float).backward();
        let ((), counts) = count_operators(body);
        let of = |name: &str| counts.get(name).copied().unwrap_or_default();
        // Other tests may compute meanwhile.
        assert!(of("mm") >= 3 && of("add") >= 1 && of("sum") >= 1, "{counts:?}");
        assert!(!counts.contains_key("t") && !counts.contains_key("matmul"), "{counts:?}");
    }
}
