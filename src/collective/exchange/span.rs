//! Addresses inside tensors.
//!
//! A [`Span`] does not keep its tensor alive. The [`Rounds`](super::rounds::Rounds) that made it
//! owns the tensor until no message and no reduction uses the span any more.

#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

/// Contiguous elements inside a tensor.
#[derive(Clone, Copy)]
pub struct Span {
    address: *mut c_void,
    pub elements: usize,
    pub kind: Kind,
}

impl Span {
    pub fn from_tensor(tensor: &Tensor) -> Self {
        Span { address: tensor.data_ptr(), elements: tensor.numel(), kind: tensor.kind() }
    }

    /// A span of `elements` of `kind` that starts at byte `first_byte` of a byte tensor.
    pub fn from_bytes(memory: &Tensor, first_byte: usize, elements: usize, kind: Kind) -> Self {
        debug_assert!(first_byte + elements * kind.elt_size_in_bytes() <= memory.numel());
        Span { address: memory.data_ptr().wrapping_byte_add(first_byte), elements, kind }
    }

    /// The empty span, for a message that only signals.
    pub fn empty() -> Self {
        Span { address: std::ptr::null_mut(), elements: 0, kind: Kind::Uint8 }
    }

    /// A span of `elements` of `kind` at an address.
    pub fn from_address(address: *mut c_void, elements: usize, kind: Kind) -> Self {
        Span { address, elements, kind }
    }

    /// At most `length` elements from `start` on; fewer or none past the end.
    pub fn part(self, start: usize, length: usize) -> Self {
        let start = start.min(self.elements);
        let address = self.address.wrapping_byte_add(start * self.kind.elt_size_in_bytes());
        Span { address, elements: length.min(self.elements - start), kind: self.kind }
    }

    pub fn address(self) -> *mut c_void {
        self.address
    }

    pub fn bytes(self) -> usize {
        self.elements * self.kind.elt_size_in_bytes()
    }

    /// True if both start at the same address.
    pub fn shares_start(self, other: Self) -> bool {
        self.address == other.address
    }

    pub fn overlaps(self, other: Self) -> bool {
        let end_of = |span: Span| span.address.wrapping_byte_add(span.bytes());
        self.address < end_of(other) && other.address < end_of(self)
    }

    /// Copies the elements of `from`, which has the same size.
    pub fn copy_from(self, from: Span) {
        self.check_apart(from);
        // SAFETY: both spans lie in memory that is kept alive; `check_apart` has checked that they
        // are of equal size and do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                from.address.cast::<u8>(),
                self.address.cast(),
                from.bytes(),
            )
        };
    }

    /// Copies the elements of `from`, which has the same size, past the caches, for another core to
    /// read.
    ///
    /// A core reads what another core has in its cache from that cache. If the two cores share no
    /// cache, a line takes 170 ns that way, and the pieces of an all-reduce four times as long as
    /// through memory. If they share one, both ways are equally fast.
    pub fn stream_from(self, from: Span) {
        self.check_apart(from);
        // SAFETY: both spans lie in memory of tensors or of the shared buffer that is kept alive;
        // `check_apart` has checked that they are of equal size and do not overlap.
        unsafe { stream(from.address.cast(), self.address.cast(), from.bytes()) };
    }

    fn check_apart(self, other: Span) {
        assert!(self.bytes() == other.bytes() && !self.overlaps(other), "apart and of equal size");
    }

    /// The elements as a tensor that shares this memory.
    pub fn tensor(self) -> Tensor {
        // SAFETY: the elements lie inside a tensor of this kind, or inside bytes, and that memory
        // is kept alive for as long as the span is used.
        unsafe {
            Tensor::from_blob(
                self.address.cast(),
                &[self.elements as i64],
                &[1],
                self.kind,
                Device::Cpu,
            )
        }
    }

    /// Passes the bytes from `first` on to `send` and returns its result.
    pub fn read<T>(self, first: usize, send: impl FnOnce(&[u8]) -> T) -> T {
        if self.elements == 0 {
            return send(&[]);
        }
        // SAFETY: the memory is kept alive, is not written while it is being sent, and the slice
        // does not outlive this call.
        let bytes = unsafe {
            std::slice::from_raw_parts(self.address.cast::<u8>().cast_const(), self.bytes())
        };
        send(&bytes[first..])
    }

    /// Lets `receive` fill the bytes from `first` on and returns its result.
    pub fn write<T>(self, first: usize, receive: impl FnOnce(&mut [u8]) -> T) -> T {
        if self.elements == 0 {
            return receive(&mut []);
        }
        // SAFETY: as in `read`; the memory is not read before the message has arrived, and every
        // bit pattern is a valid element.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(self.address.cast::<u8>(), self.bytes()) };
        receive(&mut bytes[first..])
    }
}

/// Copies with non-temporal stores.
///
/// # Safety
/// `bytes` bytes must be readable at `from` and writable at `to`, and the two must not overlap.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    use super::LINE_BYTES;
    const VECTORS: usize = LINE_BYTES / size_of::<__m128i>();

    let before = to.align_offset(LINE_BYTES).min(bytes);
    let lines = (bytes - before) / LINE_BYTES;
    let tail = before + lines * LINE_BYTES;
    // SAFETY: the caller's contract covers all bytes; the streaming stores start at the first cache
    // line boundary of `to`, so they are aligned.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, before);
        for line in 0..lines {
            let (from, to) = (
                from.add(before + line * LINE_BYTES).cast::<__m128i>(),
                to.add(before + line * LINE_BYTES).cast::<__m128i>(),
            );
            let vectors: [__m128i; VECTORS] =
                std::array::from_fn(|index| _mm_loadu_si128(from.add(index)));
            vectors
                .into_iter()
                .enumerate()
                .for_each(|(index, vector)| _mm_stream_si128(to.add(index), vector));
        }
        std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), bytes - tail);
        // Makes the piece visible before the message that signals it.
        _mm_sfence();
    }
}

/// Copies.
///
/// # Safety
/// `bytes` bytes must be readable at `from` and writable at `to`, and the two must not overlap.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's contract.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_streams_arrives_wherever_lines_begin() {
        let from = Tensor::arange(400, (Kind::Uint8, Device::Cpu));
        for (first, length) in [(0, 400), (1, 399), (63, 2), (17, 0), (5, 300)] {
            let (to, source) = (from.zeros_like(), Span::from_tensor(&from).part(first, length));
            Span::from_tensor(&to).part(first, length).stream_from(source);
            let (first, length) = (first as i64, length as i64);
            assert!(
                to.narrow(0, first, length).equal(&from.narrow(0, first, length)),
                "{length} bytes from {first}"
            );
            // Bytes outside the span stay zero.
            assert_eq!(to.sum(Kind::Int64), from.narrow(0, first, length).sum(Kind::Int64));
        }
    }
}
