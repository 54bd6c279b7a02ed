//! Reads and writes of memory that the program under test may have freed: the kernel does them and
//! refuses what is not mapped.

use std::io::Error;

use crate::failure::fail;

/// Bytes that go through one system call; they pass through a cache.
pub const BLOCK: usize = 256 << 10;

/// What an output holds from its operation's start until its end: a NaN of every float kind, and
/// −1.
pub const POISON: u8 = 0xff;

/// A stretch of this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    pub length: usize,
}

impl Span {
    pub fn new(start: usize, length: usize) -> Self {
        Span { start, length }
    }

    pub fn end(self) -> usize {
        self.start + self.length
    }

    pub fn overlaps(self, other: Span) -> bool {
        self.start < other.end() && other.start < self.end() && self.length > 0 && other.length > 0
    }

    /// The parts before and after `hole`, which lies inside.
    pub fn around(self, hole: Span) -> [Span; 2] {
        [
            Span::new(self.start, hole.start - self.start),
            Span::new(hole.end(), self.end() - hole.end()),
        ]
    }
}

/// Copies memory at `from` into `to`; false if some of it is not mapped.
pub fn read(from: usize, to: &mut [u8]) -> bool {
    let local = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let remote = libc::iovec { iov_base: from as *mut _, iov_len: to.len() };
    // SAFETY: the local part is a slice of ours; the kernel checks the remote one.
    let moved = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    is_whole(moved, to.len())
}

/// Copies `from` to memory at `to`; false if some of it is not mapped or not writable.
pub fn write(from: &[u8], to: usize) -> bool {
    let local = libc::iovec { iov_base: from.as_ptr() as *mut _, iov_len: from.len() };
    let remote = libc::iovec { iov_base: to as *mut _, iov_len: from.len() };
    // SAFETY: the local part is a slice of ours and only read; the kernel checks the remote one.
    let moved = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
    is_whole(moved, from.len())
}

fn is_whole(moved: isize, length: usize) -> bool {
    if moved < 0 && Error::last_os_error().raw_os_error() != Some(libc::EFAULT) {
        fail(format!("the kernel does not let a process read itself: {}", Error::last_os_error()));
    }
    moved == length as isize
}

/// Fills a span with poison; false if some of it is not mapped.
pub fn poison(span: Span) -> bool {
    let block = vec![POISON; BLOCK.min(span.length)];
    blocks(span.length).all(|(offset, length)| write(&block[..length], span.start + offset))
}

/// Offset and length of each block of a stretch.
pub fn blocks(length: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length).step_by(BLOCK).map(move |offset| (offset, BLOCK.min(length - offset)))
}
