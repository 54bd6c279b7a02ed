//! Addresses inside of tensors.
//!
//! Whoever makes a [`Stretch`] keeps its tensor until no message and no sum uses it any more: the
//! [`Operation`](super::operation::Operation) that owns both.

#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

/// Contiguous elements inside of a tensor.
#[derive(Clone, Copy)]
pub struct Stretch {
    address: *mut c_void,
    pub elements: usize,
    pub kind: Kind,
}

impl Stretch {
    pub fn of(tensor: &Tensor) -> Self {
        Stretch { address: tensor.data_ptr(), elements: tensor.numel(), kind: tensor.kind() }
    }

    /// Room for `elements` of `kind` in a tensor of bytes.
    pub fn within(memory: &Tensor, first_byte: usize, elements: usize, kind: Kind) -> Self {
        debug_assert!(first_byte + elements * kind.elt_size_in_bytes() <= memory.numel());
        Stretch { address: memory.data_ptr().wrapping_byte_add(first_byte), elements, kind }
    }

    /// For a message that only says that it was sent.
    pub fn nothing() -> Self {
        Stretch { address: std::ptr::null_mut(), elements: 0, kind: Kind::Uint8 }
    }

    /// `elements` at an address.
    pub fn at(address: *mut c_void, elements: usize, kind: Kind) -> Self {
        Stretch { address, elements, kind }
    }

    /// At most `length` elements from `start` on; none behind the end.
    pub fn part(self, start: usize, length: usize) -> Self {
        let start = start.min(self.elements);
        let address = self.address.wrapping_byte_add(start * self.kind.elt_size_in_bytes());
        Stretch { address, elements: length.min(self.elements - start), kind: self.kind }
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
        let end = |stretch: Stretch| stretch.address.wrapping_byte_add(stretch.bytes());
        self.address < end(other) && other.address < end(self)
    }

    /// Copies as many elements from elsewhere.
    pub fn copy_from(self, from: Stretch) {
        assert!(self.bytes() == from.bytes() && !self.overlaps(from), "apart and of equal size");
        // SAFETY: both are memory of tensors or of the board that is kept, of equal size, and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.address.cast::<u8>(), self.address.cast(), from.bytes()) };
    }

    /// The elements as a tensor, to add with.
    pub fn tensor(self) -> Tensor {
        // SAFETY: the elements lie inside of a tensor of this kind, or of bytes, that is kept for as long as the stretch.
        unsafe { Tensor::from_blob(self.address.cast(), &[self.elements as i64], &[1], self.kind, Device::Cpu) }
    }

    /// Gives the bytes from `first` on to `send`, which returns what it has done with them.
    pub fn read<T>(self, first: usize, send: impl FnOnce(&[u8]) -> T) -> T {
        if self.elements == 0 {
            return send(&[]);
        }
        // SAFETY: the memory is kept, nobody writes it while it is sent, and the slice does not outlive this call.
        let bytes = unsafe { std::slice::from_raw_parts(self.address.cast::<u8>().cast_const(), self.bytes()) };
        send(&bytes[first..])
    }

    /// Lets `receive` fill the bytes from `first` on; what it returns says how many.
    pub fn write<T>(self, first: usize, receive: impl FnOnce(&mut [u8]) -> T) -> T {
        if self.elements == 0 {
            return receive(&mut []);
        }
        // SAFETY: as in `read`; nobody reads the memory before the message has arrived, and every bit pattern is an element.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.address.cast::<u8>(), self.bytes()) };
        receive(&mut bytes[first..])
    }
}
