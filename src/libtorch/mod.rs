//! The libtorch that this process has loaded: its version, its instruction set, and the switches,
//! backward passes and exceptions that the bindings leave out.

mod attention;
mod backward;
mod operators;

use std::ffi::{CStr, c_char, c_void};
use std::fs;
use std::path::{Path, PathBuf};

pub use attention::{AttentionBackend, permit_attention, prefer_fused_attention};
pub use backward::gradients;
pub use operators::{Operators, Ran, as_one, count_operators, is_counting};
use tch::Tensor;
use torch_sys::C_tensor;

#[allow(unsafe_code)]
mod ffi {
    use super::{C_tensor, c_char, c_void};

    unsafe extern "C-unwind" {
        pub fn fm_dist_pinned(tensor: *const C_tensor) -> *mut C_tensor;
        pub fn fm_dist_copy_each(
            into: *const *mut C_tensor,
            from: *const *const C_tensor,
            count: usize,
        );
        pub fn fm_dist_gradients(
            outputs: *const *const C_tensor,
            given: *const *const C_tensor,
            num_outputs: usize,
            inputs: *const *const C_tensor,
            num_inputs: usize,
            found: *mut *mut C_tensor,
        );
        pub fn fm_dist_guarded(
            body: unsafe extern "C-unwind" fn(*mut c_void),
            on_exception: unsafe extern "C-unwind" fn(*mut c_void, *const c_char),
            data: *mut c_void,
        );
        pub fn fm_dist_on_terminate(on_exception: unsafe extern "C-unwind" fn(*const c_char));
    }

    unsafe extern "C" {
        pub safe fn fm_dist_permit_attention(backends: u32);
        pub safe fn fm_dist_prefer_fused_attention();
        pub safe fn fm_dist_watch_operators(seen: Option<extern "C" fn(*const c_char, u64, u64)>);
    }
}

/// Path of the loaded library.
pub fn library() -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])))
        .find(|path| path.ends_with("libtorch_cpu.so"))
        .map(Path::to_path_buf)
}

/// Path `torch/<name>` for the library in `torch/lib/`.
pub fn torch_file(library: &Path, name: &str) -> Option<PathBuf> {
    Some(library.parent()?.parent()?.join(name))
}

/// Version of a library, read from its wheel.
pub fn version(library: &Path) -> Option<String> {
    let text = fs::read_to_string(torch_file(library, "version.py")?).ok()?;
    parse_version(&text).map(str::to_owned)
}

/// Finds the version in the text of PyTorch's `version.py`.
fn parse_version(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("__version__ = '")?.strip_suffix('\''))
}

/// The best instruction set of this CPU for which libtorch has kernels.
#[cfg(target_arch = "x86_64")]
pub fn cpu_capability() -> &'static str {
    use std::arch::is_x86_feature_detected as detected;
    if detected!("avx512f")
        && detected!("avx512bw")
        && detected!("avx512vl")
        && detected!("avx512dq")
        && detected!("fma")
    {
        "AVX512"
    } else if detected!("avx2") && detected!("fma") {
        "AVX2"
    } else {
        "no AVX2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub fn cpu_capability() -> &'static str {
    std::env::consts::ARCH
}

/// Copies a CPU tensor to pinned memory, from which a GPU copies without a wait of the host.
///
/// # Panics
/// If there is no GPU, or no memory to pin.
#[allow(unsafe_code)]
pub fn pinned(tensor: &Tensor) -> Tensor {
    // SAFETY: the pointer is that of a living tensor; the new one is owned by the caller.
    guarded(|| unsafe { Tensor::from_ptr(ffi::fm_dist_pinned(tensor.as_ptr())) })
}

/// Copies each tensor to the one of the same number, also between kinds. A GPU does it in a few
/// launches if both of each pair are contiguous.
///
/// # Panics
/// If there are not as many of both, or a pair has not one shape (a bug in the caller).
#[allow(unsafe_code)]
pub fn copy_each(into: &mut [Tensor], from: &[Tensor]) {
    assert_eq!(into.len(), from.len(), "tensors and their places");
    let targets: Vec<*mut C_tensor> = into.iter_mut().map(Tensor::as_mut_ptr).collect();
    let sources: Vec<*const C_tensor> = from.iter().map(Tensor::as_ptr).collect();
    // SAFETY: the pointers are those of living tensors, as many as are said.
    guarded(|| unsafe {
        ffi::fm_dist_copy_each(targets.as_ptr(), sources.as_ptr(), targets.len())
    });
}

/// Largest freed block that is kept. Larger ones, the gradients of whole stages, rarely fit a later
/// request: keeping them as well once took 300 MB on top of 1.6 GB.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 64 << 20;

/// Keeps freed memory for the next tensor of its size. By default large blocks are returned to the
/// system and come back as pages that must be cleared, which took 3 % of a step of 71 million
/// parameters in bfloat16. With this, a process keeps its peak memory.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub fn keep_freed_memory() {
    for (parameter, bytes) in
        [(libc::M_MMAP_THRESHOLD, KEPT_BYTES), (libc::M_TRIM_THRESHOLD, libc::c_int::MAX)]
    {
        // SAFETY: a setting of malloc, which takes its own lock.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}

#[cfg(not(target_env = "gnu"))]
pub fn keep_freed_memory() {}

/// Makes all threads allocate from one malloc arena; must be called while there is only one thread.
/// Batches are read on one thread and freed on another. With an arena of the reader's own, freed
/// memory goes back to the system even if it is to be kept, and a batch of 17 MB took twice as long
/// to read in most runs.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub fn share_memory_among_threads() {
    // SAFETY: as in `keep_freed_memory`.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

#[cfg(not(target_env = "gnu"))]
pub fn share_memory_among_threads() {}

/// A closure that is called once, and its result or exception.
struct Guarded<F, T> {
    body: Option<F>,
    outcome: Option<T>,
    exception: String,
}

/// Calls `body` and returns its result, turning C++ exceptions into panics: Rust itself would
/// abort. Few libtorch functions are called without a wrapper that turns exceptions into errors.
/// They throw only on a failure of the system, e.g. when seeding the generator opens
/// `/dev/urandom`.
///
/// # Panics
/// With the exception's text, if `body` throws one. Values that `body` held by then may leak.
#[allow(unsafe_code)]
pub fn guarded<T>(body: impl FnOnce() -> T) -> T {
    unsafe extern "C-unwind" fn run<F: FnOnce() -> T, T>(data: *mut c_void) {
        // SAFETY: the pointer passed below, which no other code uses meanwhile.
        let guarded = unsafe { &mut *data.cast::<Guarded<F, T>>() };
        let body = guarded.body.take().expect("it is called once");
        guarded.outcome = Some(body());
    }
    unsafe extern "C-unwind" fn on_exception<F, T>(data: *mut c_void, text: *const c_char) {
        // SAFETY: as above; an exception's text is zero-terminated.
        unsafe {
            (*data.cast::<Guarded<F, T>>()).exception =
                CStr::from_ptr(text).to_string_lossy().into_owned()
        };
    }
    fn call<F: FnOnce() -> T, T>(guarded: &mut Guarded<F, T>) {
        // SAFETY: both functions are made for this type, and are called before this returns.
        unsafe {
            ffi::fm_dist_guarded(run::<F, T>, on_exception::<F, T>, (&raw mut *guarded).cast())
        }
    }
    let mut guarded = Guarded { body: Some(body), outcome: None, exception: String::new() };
    call(&mut guarded);
    guarded.outcome.unwrap_or_else(|| panic!("{}", guarded.exception))
}

/// Turns an uncaught C++ exception, e.g. on a thread of libtorch's own, into a panic, whose hook
/// prints the reason and ends the process.
#[allow(unsafe_code)]
pub fn panic_on_terminate() {
    unsafe extern "C-unwind" fn on_exception(text: *const c_char) {
        // SAFETY: an exception's text is zero-terminated.
        panic!("{}", unsafe { CStr::from_ptr(text) }.to_string_lossy());
    }
    // SAFETY: the function lives as long as the process.
    unsafe { ffi::fm_dist_on_terminate(on_exception) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_pytorch_is_read_from_its_file() {
        assert_eq!(
            parse_version(
                "from typing import Optional\n__version__ = '2.13.0+cu130'\ndebug = False\n"
            ),
            Some("2.13.0+cu130")
        );
        assert_eq!(parse_version("__version__ = 2"), None);
    }

    #[test]
    fn tensors_are_copied_to_the_places_of_their_number() {
        use tch::{Device, Kind};
        let flat = Tensor::zeros([6], (Kind::Float, Device::Cpu));
        let mut places = [flat.narrow(0, 0, 2), flat.narrow(0, 3, 3).view([3, 1])];
        let from = [
            Tensor::from_slice(&[1.5f32, 2.0]).to_kind(Kind::BFloat16),
            Tensor::from_slice(&[3.0f32, 4.0, 5.0]).view([3, 1]),
        ];
        copy_each(&mut places, &from);
        assert_eq!(Vec::<f32>::try_from(flat).expect("f32"), [1.5, 2.0, 0.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn this_very_process_has_loaded_one() {
        let library = library().expect("it is linked");
        assert!(version(&library).is_some(), "{}", library.display());
    }

    #[test]
    #[allow(unsafe_code)]
    fn an_exception_that_no_wrapper_catches_becomes_a_panic_with_its_text() {
        unsafe extern "C-unwind" {
            /// C++'s `std::__throw_length_error(const char *)`.
            #[link_name = "_ZSt20__throw_length_errorPKc"]
            fn throw(text: *const c_char) -> !;
        }
        assert_eq!(guarded(|| 7), 7);
        // SAFETY: the text is zero-terminated, and the exception is caught in C++.
        let panic =
            std::panic::catch_unwind(|| guarded(|| unsafe { throw(c"no file is left".as_ptr()) }))
                .expect_err("it throws");
        let text = panic.downcast_ref::<String>().expect("a text");
        assert_eq!(text, "no file is left");
    }
}
