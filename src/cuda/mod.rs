//! GPUs beneath libtorch: the CUDA half of it, the CUDA driver, the compiler NVRTC, and kernels of
//! our own.
//!
//! All of it is opened at run time, so that one binary serves all machines. A refusal comes back in
//! words; the caller knows what it spoils.

#![allow(unsafe_code)]

pub(crate) mod driver;
mod elementwise;
pub mod nvrtc;

use std::ffi::{CStr, c_char};

pub use elementwise::{Argument, Elementwise, Source};

use crate::error::{Error, Result};

/// What a library function gave, or its name and why it refused.
pub type Outcome<T> = std::result::Result<T, String>;

/// Opens the CUDA half of libtorch, for the rest of the process. Tensors can be on a GPU from then
/// on.
///
/// # Errors
/// [`Error::Environment`] if it is not installed, or not complete.
pub fn open_libtorch() -> Result<()> {
    use std::error::Error as _;

    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    const NAME: &str = "libtorch_cuda.so";
    // SAFETY: its initializers register kernels with libtorch, whose version is the same, and ask
    // nothing else of the process.
    let library = unsafe { Library::open(Some(NAME), RTLD_NOW | RTLD_GLOBAL) };
    let missing = |error: libloading::Error| {
        // The error itself says no more than that it failed.
        let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        Error::environment(format!(
            "cannot open {NAME} ({why}): on a machine with an NVIDIA driver run launch/setup.sh"
        ))
    };
    // Closing it would take kernels away that libtorch holds on to.
    std::mem::forget(library.map_err(missing)?);
    Ok(())
}

/// A text that a library keeps for the life of the process.
pub(crate) fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return "no text".into();
    }
    // SAFETY: the libraries end these texts with a zero.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_the_cuda_half_of_libtorch_is_told_so() {
        let has_driver = std::path::Path::new("/proc/driver/nvidia/version").exists();
        match open_libtorch() {
            Ok(()) => assert_eq!(tch::Cuda::is_available(), has_driver),
            Err(error) => {
                assert_eq!(error.exit_code(), 52);
                let text = error.to_string();
                assert!(
                    text.starts_with("cannot open libtorch_cuda.so (lib")
                        && text.ends_with("run launch/setup.sh"),
                    "{text}"
                );
            }
        }
    }
}
