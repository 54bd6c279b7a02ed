//! C++ exceptions that no wrapper of the bindings catches, as panics.

use std::ffi::{CStr, c_char, c_void};

use super::ffi;

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
