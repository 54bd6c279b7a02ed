//! What must be gone when the process ends well.

use std::ffi::{c_int, c_void};
use std::sync::Once;

use crate::board;
use crate::failure::fail;
use crate::switches::switches;
use crate::world::{World, try_world};

unsafe extern "C" {
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

/// Looks for leaks when the process exits.
pub fn watch() {
    static ONCE: Once = Once::new();
    // SAFETY: the function lives as long as the library, which nobody unloads.
    ONCE.call_once(|| {
        assert_eq!(
            unsafe { on_exit(at_exit, std::ptr::null_mut()) },
            0,
            "no room for an exit function"
        )
    });
}

/// A process that ends with a failure, be it by an abort, leaves everything as it was: nothing is
/// said then.
extern "C" fn at_exit(status: c_int, _: *mut c_void) {
    if status == 0
        && let Some(world) = try_world()
        && let Some(leak) = first_leak(&world)
    {
        fail(format!("at the process's end {leak}"));
    }
    board::leave_all(board::LEFT);
}

fn first_leak(world: &World) -> Option<String> {
    if !world.groups.is_empty() {
        return Some("a group is open".into());
    }
    let unobserved = world.unobserved(None);
    let communicator =
        || world.communicators.iter().next().map(|(handle, _)| world.communicators.title(handle));
    let event = || world.events.iter().next().map(|(handle, _)| world.events.title(handle));
    let stream = || world.streams.iter().next().map(|(handle, _)| world.streams.title(handle));
    let module = || {
        let mut modules = world.modules.iter().filter(|_| !switches().modules_stay);
        modules.next().map(|(handle, _)| world.modules.title(handle))
    };
    unobserved.or_else(|| {
        communicator()
            .or_else(event)
            .or_else(stream)
            .or_else(module)
            .map(|title| format!("{title} was not destroyed"))
    })
}
