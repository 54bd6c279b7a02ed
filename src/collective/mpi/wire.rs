//! Messages between two ranks: the calls into MPI that carry bytes, and what they say when they fail.
//!
//! A [`Stretch`] is an address. Whoever makes one keeps its tensor until no message and no sum uses it any more: the
//! [`Operation`](super::exchange::Operation) that owns both.

#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{Ordering, fence};

use mpi::ffi;
use tch::{Device, Kind, Tensor};

use super::super::call::Call;
use crate::error::{Error, Result};

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
}

/// What the messages of one operation have in common.
pub struct Channel {
    pub communicator: ffi::MPI_Comm,
    pub call: Call,
    /// Differs between operations, so that a peer at another one is recognized.
    pub tag: c_int,
    /// The operation, for an error.
    pub what: String,
}

/// Messages under way that are waited for together.
#[derive(Default)]
pub struct Flight {
    requests: Vec<ffi::MPI_Request>,
    /// Who sends how many bytes, for each request that receives.
    due: Vec<Option<(usize, usize)>>,
    /// What is copied, from and to, when all have arrived.
    copies: Vec<(Stretch, Stretch)>,
}

impl Flight {
    /// Starts to send; of nothing no message is made.
    pub fn send(&mut self, channel: &Channel, stretch: Stretch, peer: usize) -> Result<()> {
        let (bytes, peer, tag) = (stretch.bytes(), peer as c_int, channel.tag);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the stretch is memory of a tensor that is kept, and nobody writes it before this flight was waited for.
        self.start(channel, bytes, None, |count, request| unsafe {
            ffi::MPI_Isend(stretch.address, count, ffi::RSMPI_UINT8_T, peer, tag, channel.communicator, request)
        })
    }

    /// Starts to receive; of nothing no message is made. Any tag will do: messages of one peer arrive in order, so another tag is another operation.
    pub fn receive(&mut self, channel: &Channel, stretch: Stretch, peer: usize) -> Result<()> {
        let bytes = stretch.bytes();
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as in `send`; nobody reads it either.
        self.start(channel, bytes, Some((peer, bytes)), |count, request| unsafe {
            ffi::MPI_Irecv(stretch.address, count, ffi::RSMPI_UINT8_T, peer as c_int, ffi::RSMPI_ANY_TAG, channel.communicator, request)
        })
    }

    /// Starts to tell a peer that something is done.
    pub fn tell(&mut self, channel: &Channel, peer: usize) -> Result<()> {
        // What is written to shared memory before is seen by who receives the note.
        fence(Ordering::SeqCst);
        // SAFETY: a message without elements reads no memory.
        self.start(channel, 0, None, |count, request| unsafe {
            ffi::MPI_Isend(null(), count, ffi::RSMPI_UINT8_T, peer as c_int, channel.tag, channel.communicator, request)
        })
    }

    /// Starts to listen for what a peer tells.
    pub fn hear(&mut self, channel: &Channel, peer: usize) -> Result<()> {
        // SAFETY: a message without elements writes no memory.
        self.start(channel, 0, Some((peer, 0)), |count, request| unsafe {
            ffi::MPI_Irecv(null_mut(), count, ffi::RSMPI_UINT8_T, peer as c_int, ffi::RSMPI_ANY_TAG, channel.communicator, request)
        })
    }

    /// Once everything has arrived, `from` is copied to `to`.
    pub fn then_copy(&mut self, from: Stretch, to: Stretch) {
        self.copies.push((from, to));
    }

    fn start(
        &mut self,
        channel: &Channel,
        bytes: usize,
        due: Option<(usize, usize)>,
        start: impl FnOnce(c_int, *mut ffi::MPI_Request) -> c_int,
    ) -> Result<()> {
        // SAFETY: a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(channel.call, start(bytes as c_int, &mut request))?;
        self.requests.push(request);
        self.due.push(due);
        Ok(())
    }

    /// Blocks until every message has arrived or left.
    pub fn wait(&mut self, channel: &Channel) -> Result<()> {
        // SAFETY: a status is plain integers, for which zero is a value.
        let mut statuses: Vec<ffi::MPI_Status> = self.requests.iter().map(|_| unsafe { std::mem::zeroed() }).collect();
        // SAFETY: the requests were started by MPI calls that succeeded and are waited for once; there is a status for each.
        let code = unsafe { ffi::MPI_Waitall(self.requests.len() as c_int, self.requests.as_mut_ptr(), statuses.as_mut_ptr()) };
        if [ffi::MPI_SUCCESS, ffi::MPI_ERR_IN_STATUS].contains(&(code as u32)) {
            let arrivals = self.due.iter().zip(&statuses).filter_map(|(due, status)| Some(((*due)?, status)));
            arrivals.into_iter().try_for_each(|((peer, bytes), status)| channel.check_arrival(peer, bytes, status))?;
        }
        if code == ffi::MPI_ERR_IN_STATUS as c_int {
            let failed = |code: &c_int| ![ffi::MPI_SUCCESS as c_int, ffi::MPI_ERR_PENDING as c_int].contains(code);
            check(channel.call, statuses.iter().map(|status| status.MPI_ERROR).find(failed).unwrap_or(code))?;
        }
        check(channel.call, code)?;
        fence(Ordering::SeqCst);
        self.copies.drain(..).for_each(|(from, to)| to.copy_from(from));
        self.requests.clear();
        self.due.clear();
        Ok(())
    }
}

impl Channel {
    /// MPI itself takes any shorter message for the one that was due, and says of a longer one only that it was.
    fn check_arrival(&self, peer: usize, due: usize, status: &ffi::MPI_Status) -> Result<()> {
        if ![ffi::MPI_SUCCESS, ffi::MPI_ERR_TRUNCATE].contains(&(status.MPI_ERROR as u32)) {
            return Ok(());
        }
        let mut sent = 0;
        // SAFETY: MPI has filled the status in for a message of bytes, and the result has a place.
        check(self.call, unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut sent) })?;
        if status.MPI_TAG == self.tag && sent as usize == due {
            return Ok(());
        }
        let other = if status.MPI_TAG == self.tag { "" } else { " of another operation" };
        Err(self.call.error(format!("ranks disagree: rank {peer} sent {sent} bytes{other}, {due} were due here for {}", self.what)))
    }
}

pub fn check(call: Call, code: c_int) -> Result<(), Error> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    // SAFETY: the buffer has the size which the standard demands for this call.
    let message = text(ffi::MPI_MAX_ERROR_STRING as usize, |buffer, length| unsafe { ffi::MPI_Error_string(code, buffer, length) });
    Err(call.error(format!("{message} (code {code})")))
}

/// What an MPI call writes to a text buffer of `size` bytes.
pub fn text(size: usize, write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> String {
    let mut buffer = vec![0u8; size + 1];
    let mut length = 0;
    write(buffer.as_mut_ptr().cast(), &mut length);
    let length = usize::try_from(length).unwrap_or(0).min(size);
    String::from_utf8_lossy(&buffer[..length]).trim_end_matches(['\0', '\n']).into()
}
