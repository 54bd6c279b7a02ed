//! Addresses inside of tensors.
//!
//! Whoever makes a [`Span`] keeps its tensor until no message and no sum uses it any more: the
//! [`Rounds`](super::operation::Rounds) that owns both.

#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

/// Contiguous elements inside of a tensor.
#[derive(Clone, Copy)]
pub struct Span {
    address: *mut c_void,
    pub elements: usize,
    pub kind: Kind,
}

impl Span {
    pub fn of_tensor(tensor: &Tensor) -> Self {
        Span { address: tensor.data_ptr(), elements: tensor.numel(), kind: tensor.kind() }
    }

    /// Scratch for `elements` of `kind` in a tensor of bytes.
    pub fn within(memory: &Tensor, first_byte: usize, elements: usize, kind: Kind) -> Self {
        debug_assert!(first_byte + elements * kind.elt_size_in_bytes() <= memory.numel());
        Span { address: memory.data_ptr().wrapping_byte_add(first_byte), elements, kind }
    }

    /// For a message that only says that it was sent.
    pub fn nothing() -> Self {
        Span { address: std::ptr::null_mut(), elements: 0, kind: Kind::Uint8 }
    }

    /// `elements` at an address.
    pub fn from_address(address: *mut c_void, elements: usize, kind: Kind) -> Self {
        Span { address, elements, kind }
    }

    /// At most `length` elements from `start` on; none behind the end.
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

    /// Whether both are the same memory.
    pub fn is(self, other: Self) -> bool {
        self.address == other.address
    }

    pub fn overlaps(self, other: Self) -> bool {
        let end = |span: Span| span.address.wrapping_byte_add(span.bytes());
        self.address < end(other) && other.address < end(self)
    }

    /// Copies as many elements from elsewhere.
    pub fn copy_from(self, from: Span) {
        self.check_apart(from);
        // SAFETY: both are memory of tensors that are kept, of equal size, and do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                from.address.cast::<u8>(),
                self.address.cast(),
                from.bytes(),
            )
        };
    }

    /// Copies as many elements from elsewhere, past the caches, to be read by another core.
    ///
    /// What one core has written into its cache another one gets from there. Where the two share
    /// none, a line takes 170 ns, and the pieces of an all-reduce four times as long as by way of
    /// the memory; where they share one, both ways are equal.
    pub fn stream_from(self, from: Span) {
        self.check_apart(from);
        // SAFETY: both are memory of tensors or of the shared_buffer that is kept, of equal size, and do
        // not overlap.
        unsafe { stream(from.address.cast(), self.address.cast(), from.bytes()) };
    }

    fn check_apart(self, other: Span) {
        assert!(self.bytes() == other.bytes() && !self.overlaps(other), "apart and of equal size");
    }

    /// The elements as a tensor, to add with.
    pub fn tensor(self) -> Tensor {
        // SAFETY: the elements lie inside of a tensor of this kind, or of bytes, that is kept for
        // as long as the span.
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

    /// Gives the bytes from `first` on to `send`, which returns what it has done with them.
    pub fn read<T>(self, first: usize, send: impl FnOnce(&[u8]) -> T) -> T {
        if self.elements == 0 {
            return send(&[]);
        }
        // SAFETY: the memory is kept, nobody writes it while it is sent, and the slice does not
        // outlive this call.
        let bytes = unsafe {
            std::slice::from_raw_parts(self.address.cast::<u8>().cast_const(), self.bytes())
        };
        send(&bytes[first..])
    }

    /// Lets `receive` fill the bytes from `first` on; what it returns says how many.
    pub fn write<T>(self, first: usize, receive: impl FnOnce(&mut [u8]) -> T) -> T {
        if self.elements == 0 {
            return receive(&mut []);
        }
        // SAFETY: as in `read`; nobody reads the memory before the message has arrived, and every
        // bit pattern is an element.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(self.address.cast::<u8>(), self.bytes()) };
        receive(&mut bytes[first..])
    }
}

/// # Safety
/// `bytes` may be read at `from` and written at `to`, and do not overlap.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    use super::LINE_BYTES;
    const VECTORS: usize = LINE_BYTES / size_of::<__m128i>();

    let before = to.align_offset(LINE_BYTES).min(bytes);
    let lines = (bytes - before) / LINE_BYTES;
    let behind = before + lines * LINE_BYTES;
    // SAFETY: the caller's; whole lines begin where one does.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, before);
        for line in 0..lines {
            let (from, to) = (
                from.add(before + line * LINE_BYTES).cast::<__m128i>(),
                to.add(before + line * LINE_BYTES).cast::<__m128i>(),
            );
            let vectors: [__m128i; VECTORS] =
                std::array::from_fn(|membership| _mm_loadu_si128(from.add(membership)));
            vectors
                .into_iter()
                .enumerate()
                .for_each(|(membership, vector)| _mm_stream_si128(to.add(membership), vector));
        }
        std::ptr::copy_nonoverlapping(from.add(behind), to.add(behind), bytes - behind);
        // What comes after, the message that says that the piece is there, is not seen before the
        // piece.
        _mm_sfence();
    }
}

/// # Safety
/// `bytes` may be read at `from` and written at `to`, and do not overlap.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_streams_arrives_wherever_lines_begin() {
        let from = Tensor::arange(400, (Kind::Uint8, Device::Cpu));
        for (first, length) in [(0, 400), (1, 399), (63, 2), (17, 0), (5, 300)] {
            let (to, source) = (from.zeros_like(), Span::of_tensor(&from).part(first, length));
            Span::of_tensor(&to).part(first, length).stream_from(source);
            let (first, length) = (first as i64, length as i64);
            assert!(
                to.narrow(0, first, length).equal(&from.narrow(0, first, length)),
                "{length} bytes from {first}"
            );
            // Nothing beside them.
            assert_eq!(to.sum(Kind::Int64), from.narrow(0, first, length).sum(Kind::Int64));
        }
    }
}
