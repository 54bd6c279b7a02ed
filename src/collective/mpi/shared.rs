//! Allocates the memory of a [`SharedBuffer`] through MPI, for the ranks of one machine.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use super::super::call::Call;
use super::super::exchange::{LINE_BYTES, Membership, PIECE_BYTES, SLOTS, SharedBuffer};
use super::channel::check;
use crate::error::Result;
use mpi::ffi;

/// Bytes of one rank's slots; with many ranks, pieces become smaller instead.
const AREA_BYTES: usize = 4 << 20;

/// Allocates a shared buffer for the ranks of a communicator; `None` if they are not all on one
/// machine. Every rank calls it.
pub fn shared_buffer(
    communicator: ffi::MPI_Comm,
    membership: Membership,
) -> Result<Option<SharedBuffer>> {
    let call = Call { backend: "mpi", operation: "share memory" };
    if !is_one_machine(communicator, membership, call)? {
        return Ok(None);
    }
    let slots = SLOTS * (membership.world_size + 1);
    let piece_bytes = (AREA_BYTES / slots / LINE_BYTES * LINE_BYTES).clamp(LINE_BYTES, PIECE_BYTES);
    let window = allocate(communicator, call, slots * piece_bytes)?;
    let areas =
        (0..membership.world_size).map(|rank| area(window, call, rank)).collect::<Result<_>>()?;
    Ok(Some(SharedBuffer::new(membership, piece_bytes, areas)))
}

fn is_one_machine(communicator: ffi::MPI_Comm, membership: Membership, call: Call) -> Result<bool> {
    // SAFETY: constants of the library; every rank of the valid communicator makes this call, and
    // the results are written to live variables.
    let size = unsafe {
        let (mut part, mut size) = (ffi::RSMPI_COMM_NULL, 0);
        let split = ffi::MPI_Comm_split_type(
            communicator,
            ffi::RSMPI_COMM_TYPE_SHARED,
            0,
            ffi::RSMPI_INFO_NULL,
            &mut part,
        );
        check(call, split)?;
        check(call, ffi::MPI_Comm_size(part, &mut size))?;
        check(call, ffi::MPI_Comm_free(&mut part))?;
        size
    };
    // All ranks must take the same decision: a rank that is alone on its machine decides for all.
    let (own, mut all): (c_int, c_int) = ((size as usize == membership.world_size).into(), 0);
    // SAFETY: both are one C int, and every rank makes this call.
    let reduced = unsafe {
        let (from, to) = ((&raw const own).cast(), (&raw mut all).cast());
        ffi::MPI_Allreduce(from, to, 1, ffi::RSMPI_INT32_T, ffi::RSMPI_MIN, communicator)
    };
    check(call, reduced)?;
    Ok(all == 1)
}

/// Allocates `bytes` for each rank. The memory is freed by the end of the process, because freeing
/// it would need all ranks at once.
fn allocate(communicator: ffi::MPI_Comm, call: Call, bytes: usize) -> Result<ffi::MPI_Win> {
    let mut own: *mut c_void = null_mut();
    // SAFETY: every rank of the communicator, which is on one machine, makes this call with the
    // same size; the results are written to live variables.
    unsafe {
        let mut window = std::mem::zeroed();
        let (base, info) = ((&raw mut own).cast(), ffi::RSMPI_INFO_NULL);
        check(
            call,
            ffi::MPI_Win_allocate_shared(
                bytes as ffi::MPI_Aint,
                1,
                info,
                communicator,
                base,
                &mut window,
            ),
        )?;
        // Allows loads and stores of the other ranks' memory from here on.
        check(call, ffi::MPI_Win_lock_all(ffi::MPI_MODE_NOCHECK as c_int, window))?;
        Ok(window)
    }
}

fn area(window: ffi::MPI_Win, call: Call, rank: usize) -> Result<*mut c_void> {
    let (mut bytes, mut unit, mut base): (ffi::MPI_Aint, c_int, *mut c_void) = (0, 0, null_mut());
    // SAFETY: the window is valid and contains this rank; the results are written to live
    // variables.
    check(call, unsafe {
        ffi::MPI_Win_shared_query(
            window,
            rank as c_int,
            &mut bytes,
            &mut unit,
            (&raw mut base).cast(),
        )
    })?;
    Ok(base)
}
