//! Messages between two ranks: the MPI calls that carry bytes, and their errors.

#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};
use std::ptr::{null, null_mut};
use std::sync::atomic::{Ordering, fence};

use mpi::ffi;

use super::super::Issued;
use super::super::call::Call;
use super::super::exchange::{Channel, Span};
use crate::error::{Error, Result};

/// The messages of one operation.
pub struct MpiChannel {
    pub communicator: ffi::MPI_Comm,
    pub rank: usize,
    pub call: Call,
    pub issued: Issued,
}

/// Messages under way.
#[derive(Default)]
pub struct Messages {
    requests: Vec<ffi::MPI_Request>,
    /// Peer and number of bytes of each request that receives; `None` for one that sends.
    due: Vec<Option<(usize, usize)>>,
}

impl Channel for MpiChannel {
    type Messages = Messages;

    fn send(&self, messages: &mut Messages, span: Span, peer: usize) -> Result<()> {
        // SAFETY: the span lies in memory that is kept alive and not written before the message has
        // been waited for.
        self.start(messages, span.bytes(), None, |count, request| unsafe {
            ffi::MPI_Isend(
                span.address(),
                count,
                ffi::RSMPI_UINT8_T,
                peer as c_int,
                self.tag(),
                self.communicator,
                request,
            )
        })
    }

    /// Accepts any tag: messages of one peer arrive in order, so another tag belongs to another
    /// operation.
    fn receive(&self, messages: &mut Messages, span: Span, peer: usize) -> Result<()> {
        let bytes = span.bytes();
        // SAFETY: as in `send`, and the memory is not read either.
        self.start(messages, bytes, Some((peer, bytes)), |count, request| unsafe {
            ffi::MPI_Irecv(
                span.address(),
                count,
                ffi::RSMPI_UINT8_T,
                peer as c_int,
                ffi::RSMPI_ANY_TAG,
                self.communicator,
                request,
            )
        })
    }

    fn send_signal(&self, messages: &mut Messages, peer: usize) -> Result<()> {
        fence(Ordering::SeqCst);
        // SAFETY: a message without elements reads no memory.
        self.start(messages, 0, None, |count, request| unsafe {
            ffi::MPI_Isend(
                null(),
                count,
                ffi::RSMPI_UINT8_T,
                peer as c_int,
                self.tag(),
                self.communicator,
                request,
            )
        })
    }

    fn receive_signal(&self, messages: &mut Messages, peer: usize) -> Result<()> {
        // SAFETY: a message without elements writes no memory.
        self.start(messages, 0, Some((peer, 0)), |count, request| unsafe {
            ffi::MPI_Irecv(
                null_mut(),
                count,
                ffi::RSMPI_UINT8_T,
                peer as c_int,
                ffi::RSMPI_ANY_TAG,
                self.communicator,
                request,
            )
        })
    }

    fn wait(&self, messages: &mut Messages) -> Result<()> {
        let Messages { requests, due } = messages;
        // SAFETY: a status is plain integers, for which zero is a valid value.
        let mut statuses: Vec<ffi::MPI_Status> =
            requests.iter().map(|_| unsafe { std::mem::zeroed() }).collect();
        // SAFETY: the requests were started by successful MPI calls and are waited for once; there
        // is one status for each.
        let code = unsafe {
            ffi::MPI_Waitall(requests.len() as c_int, requests.as_mut_ptr(), statuses.as_mut_ptr())
        };
        if [ffi::MPI_SUCCESS, ffi::MPI_ERR_IN_STATUS].contains(&(code as u32)) {
            let arrivals =
                due.iter().zip(&statuses).filter_map(|(due, status)| Some(((*due)?, status)));
            arrivals
                .into_iter()
                .try_for_each(|((peer, bytes), status)| self.check_arrival(peer, bytes, status))?;
        }
        if code == ffi::MPI_ERR_IN_STATUS as c_int {
            let failed = |code: &c_int| {
                ![ffi::MPI_SUCCESS as c_int, ffi::MPI_ERR_PENDING as c_int].contains(code)
            };
            check(
                self.call,
                statuses.iter().map(|status| status.MPI_ERROR).find(failed).unwrap_or(code),
            )?;
        }
        check(self.call, code)?;
        fence(Ordering::SeqCst);
        requests.clear();
        due.clear();
        Ok(())
    }
}

impl MpiChannel {
    /// Differs between operations, so that a message of another operation is recognized. MPI
    /// guarantees 15 bits.
    fn tag(&self) -> c_int {
        (self.issued.digest & 0x7fff) as c_int
    }

    fn start(
        &self,
        messages: &mut Messages,
        bytes: usize,
        due: Option<(usize, usize)>,
        start: impl FnOnce(c_int, *mut ffi::MPI_Request) -> c_int,
    ) -> Result<()> {
        // SAFETY: a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(self.call, start(bytes as c_int, &mut request))?;
        messages.requests.push(request);
        messages.due.push(due);
        Ok(())
    }

    /// Checks tag and size of a message: MPI accepts a shorter message than was expected, and
    /// reports of a longer one only that it was longer.
    fn check_arrival(&self, peer: usize, due: usize, status: &ffi::MPI_Status) -> Result<()> {
        if ![ffi::MPI_SUCCESS, ffi::MPI_ERR_TRUNCATE].contains(&(status.MPI_ERROR as u32)) {
            return Ok(());
        }
        let mut sent = 0;
        // SAFETY: MPI has filled in the status of a message of bytes, and the result is written to
        // a live integer.
        check(self.call, unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut sent) })?;
        if status.MPI_TAG == self.tag() && sent as usize == due {
            return Ok(());
        }
        // Only the size and the tag of the message are known.
        let other = if status.MPI_TAG == self.tag() { "" } else { " of another operation" };
        let (rank, ours) = (self.rank, self.issued);
        Err(Error::Desync {
            what: format!(
                "ranks disagree: rank {peer} sent {sent} bytes{other}, rank {rank} is at {ours} and expected {due}"
            ),
        })
    }
}

pub fn check(call: Call, code: c_int) -> Result<(), Error> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    // SAFETY: the buffer has the size that the standard demands for this call.
    let message = text(ffi::MPI_MAX_ERROR_STRING as usize, |buffer, length| unsafe {
        ffi::MPI_Error_string(code, buffer, length)
    });
    Err(call.error(format!("{message} (code {code})")))
}

/// Returns the text that an MPI call writes to a buffer of `size` bytes.
pub fn text(size: usize, write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> String {
    let mut buffer = vec![0u8; size + 1];
    let mut length = 0;
    write(buffer.as_mut_ptr().cast(), &mut length);
    let length = usize::try_from(length).unwrap_or(0).min(size);
    String::from_utf8_lossy(&buffer[..length]).trim_end_matches(['\0', '\n']).into()
}
