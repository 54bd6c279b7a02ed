//! A copy from the host to a GPU, both of which are this process's memory here.

use std::ffi::{c_uint, c_void};

use crate::clock;
use crate::cuda::{CuResult, INVALID_CONTEXT, INVALID_VALUE, SUCCESS, current_device};
use crate::failure::fail;
use crate::memory::{self, BLOCK, POISON, Span, blocks};
use crate::world::world;

pub struct Copy {
    from: Span,
    to: Span,
    pub launched_at: u64,
}

impl Copy {
    pub const NAME: &str = "cuMemcpyHtoDAsync";

    pub fn describe(&self) -> String {
        format!("{} of {} bytes", Copy::NAME, self.to.length)
    }

    /// Spoils the output until the copy is done.
    fn start(from: Span, to: Span) -> Self {
        let copy = Copy { from, to, launched_at: clock::now() };
        if from.overlaps(to) {
            fail(format!("{}: input and output overlap", copy.describe()));
        }
        if !memory::poison(to) {
            fail(format!("{}: its output is not mapped", copy.describe()));
        }
        copy
    }

    /// Checks that nobody touched the output since, and copies.
    pub fn finish(&self) {
        let mut block = vec![0; BLOCK];
        for (offset, length) in blocks(self.to.length) {
            let part = &mut block[..length];
            if !memory::read(self.to.start + offset, part) {
                fail(format!("{}: its output was freed before it was done", self.describe()));
            }
            if part.iter().any(|byte| *byte != POISON) {
                fail(format!("{}: its output was written before it was done", self.describe()));
            }
            if !memory::read(self.from.start + offset, part) {
                fail(format!("{}: its input was freed before it was done", self.describe()));
            }
            memory::write(part, self.to.start + offset);
        }
    }
}

/// Memory of the host that a GPU reads by itself; no flags are known here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(
    start: *mut *mut c_void,
    bytes: usize,
    flags: c_uint,
) -> CuResult {
    if current_device().is_none() {
        return INVALID_CONTEXT;
    }
    if flags != 0 || bytes == 0 {
        return INVALID_VALUE;
    }
    // SAFETY: the size is not zero.
    let memory = unsafe { libc::malloc(bytes) };
    world().pinned.insert(memory as usize, bytes);
    unsafe { start.write(memory) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(start: *mut c_void) -> CuResult {
    if world().pinned.remove(&(start as usize)).is_none() {
        fail(format!("cuMemFreeHost: {start:?} was not allocated by cuMemHostAlloc"));
    }
    // SAFETY: allocated above, and freed once.
    unsafe { libc::free(start) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: usize,
    from: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> CuResult {
    let (stream, mut world) = (stream as usize, world());
    if stream == 0 {
        fail(format!("{}: in the compute stream it keeps computation waiting", Copy::NAME));
    }
    world.check_settled(stream, Copy::NAME);
    if !world.is_fresh(stream, Copy::NAME) {
        fail(format!(
            "{}: {} has not waited for the compute stream since the launch before, whose memory this may be",
            Copy::NAME,
            world.streams.title(stream)
        ));
    }
    let from = from as usize;
    let pinned = world.pinned.range(..=from).next_back();
    if pinned.is_none_or(|(start, length)| from + bytes > start + length) {
        fail(format!("{}: memory that is not pinned keeps the host waiting", Copy::NAME));
    }
    world.copy(stream, Copy::start(Span::new(from, bytes), Span::new(to, bytes)));
    SUCCESS
}
