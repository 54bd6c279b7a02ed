//! CUDA below libtorch: libtorch's own CUDA library, the CUDA driver, the compiler NVRTC, own
//! kernels, and the health of a GPU.
//!
//! All libraries are opened at run time, so one binary serves all machines. Errors are returned as
//! texts, because only the caller knows what they affect.

#![allow(unsafe_code)]

pub(crate) mod driver;
mod elementwise;
mod from_host;
pub mod health;
pub mod nvrtc;
mod program;
pub mod system;

use std::ffi::{CStr, c_char};

pub(crate) use driver::Event;
pub use driver::Grid;
pub use elementwise::{Elementwise, Source};
pub(crate) use from_host::FromHost;
pub use from_host::PinnedMemory;
pub use program::{Argument, Program, THREADS, Text};

use crate::error::{Error, Result};

/// Result of a library function; the error names the function and the reason.
pub type Outcome<T> = std::result::Result<T, String>;

/// Opens libtorch's CUDA library for the rest of the process. From then on tensors can be on a GPU.
///
/// # Errors
/// [`Error::Environment`] if the library is not installed, or is incomplete.
pub fn open_libtorch() -> Result<()> {
    use std::error::Error as _;

    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    const NAME: &str = "libtorch_cuda.so";
    // SAFETY: its initializers only register kernels with libtorch, which has the same version.
    let library = unsafe { Library::open(Some(NAME), RTLD_NOW | RTLD_GLOBAL) };
    let missing = |error: libloading::Error| {
        // The error itself says only that opening failed; its source has the reason.
        let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        Error::environment(format!(
            "cannot open {NAME} ({why}): on a machine with an NVIDIA driver run launch/setup.sh"
        ))
    };
    // Never closed, because libtorch keeps pointers to its kernels.
    std::mem::forget(library.map_err(missing)?);
    Ok(())
}

/// Copies a text that a library keeps for the life of the process.
pub(crate) fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return "no text".into();
    }
    // SAFETY: the libraries zero-terminate these texts.
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
