//! The libtorch that this process has loaded: its version, its instruction set, and the switches,
//! backward passes and exceptions that the bindings leave out.

mod attention;
mod backward;
mod copies;
mod exceptions;
mod library;
mod malloc;
mod operators;
mod places;

pub use attention::{AttentionBackend, permit_attention, prefer_fused_attention};
pub use backward::gradients;
pub use copies::{copy_each, pinned};
pub use exceptions::{guarded, panic_on_terminate};
pub use library::{cpu_capability, library, torch_file, version};
pub use malloc::{keep_freed_memory, share_memory_among_threads};
pub use operators::{Operators, Ran, as_one, count_operators, is_counting};
pub use places::{offer_place, take_place};

#[allow(unsafe_code)]
mod ffi {
    use std::ffi::{c_char, c_void};

    use torch_sys::C_tensor;

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
        pub fn fm_dist_offer_place(leaf: *const C_tensor, place: *const C_tensor);
        pub fn fm_dist_take_place(leaf: *const C_tensor) -> *mut C_tensor;
        pub safe fn fm_dist_permit_attention(backends: u32);
        pub safe fn fm_dist_prefer_fused_attention();
        pub safe fn fm_dist_watch_operators(seen: Option<extern "C" fn(*const c_char, u64, u64)>);
    }
}
