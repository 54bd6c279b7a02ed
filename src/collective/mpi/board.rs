//! Memory that the ranks of one machine share: a piece is written there once and summed or copied from there, where a message
//! would be copied into the library and out of it again.
//!
//! An empty message still goes from rank to rank for each piece: it says that the piece is there, keeps the order,
//! carries the tag by which ranks notice that they disagree, and takes whatever MPI has to say of a dead peer.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use super::super::call::Call;
use super::part::Place;
use super::wire::{Stretch, check};
use crate::error::Result;
use mpi::ffi;

/// Rounds after which a slot is written anew. When a rank begins a round it has received, and so every peer has used, all
/// pieces up to this many rounds before.
const SLOTS: usize = 4;

/// Memory of one rank's slots; with many ranks, pieces become smaller instead.
const AREA_BYTES: usize = 4 << 20;

/// Slots of all ranks: of each rank [`SLOTS`] for each peer's pieces, and as many for what it hands to all.
pub struct Board {
    place: Place,
    /// Bytes of a slot.
    pub piece_bytes: usize,
    /// Where each rank's slots begin.
    areas: Vec<*mut c_void>,
}

impl Board {
    /// A board for the ranks of a communicator; none where they are not on one machine. Every rank calls it.
    pub fn of(place: Place, largest_piece: usize, unit: usize) -> Result<Option<Self>> {
        let call = Call { backend: "mpi", operation: "share memory" };
        if !is_one_machine(place, call)? {
            return Ok(None);
        }
        let slots = SLOTS * (place.world_size + 1);
        let piece_bytes = (AREA_BYTES / slots / unit * unit).clamp(unit, largest_piece);
        let window = allocate(place, call, slots * piece_bytes)?;
        let areas = (0..place.world_size).map(|rank| area(window, call, rank)).collect::<Result<_>>()?;
        Ok(Some(Board { place, piece_bytes, areas }))
    }

    /// Where rank `from` puts its piece of a round for rank `to`; for a piece of this size and kind.
    pub fn between(&self, from: usize, to: usize, round: usize, piece: Stretch) -> Stretch {
        self.slot(from, to, round, piece)
    }

    /// Where rank `from` puts what it hands to all.
    pub fn for_all(&self, from: usize, round: usize, piece: Stretch) -> Stretch {
        self.slot(from, self.place.world_size, round, piece)
    }

    fn slot(&self, of: usize, column: usize, round: usize, piece: Stretch) -> Stretch {
        debug_assert!(piece.bytes() <= self.piece_bytes);
        let slot = column * SLOTS + round % SLOTS;
        Stretch::at(self.areas[of].wrapping_byte_add(slot * self.piece_bytes), piece.elements, piece.kind)
    }
}

fn is_one_machine(place: Place, call: Call) -> Result<bool> {
    // SAFETY: constants of the library; every rank of the valid communicator comes here, and the results have a place.
    let size = unsafe {
        let (mut part, mut size) = (ffi::RSMPI_COMM_NULL, 0);
        let split = ffi::MPI_Comm_split_type(place.communicator, ffi::RSMPI_COMM_TYPE_SHARED, 0, ffi::RSMPI_INFO_NULL, &mut part);
        check(call, split)?;
        check(call, ffi::MPI_Comm_size(part, &mut size))?;
        check(call, ffi::MPI_Comm_free(&mut part))?;
        size
    };
    // The same on every rank only once all agree: a rank alone on its machine says no for all of them.
    let (own, mut all): (c_int, c_int) = ((size as usize == place.world_size).into(), 0);
    // SAFETY: both are one C int, and every rank comes here.
    let reduced = unsafe {
        let (from, to) = ((&raw const own).cast(), (&raw mut all).cast());
        ffi::MPI_Allreduce(from, to, 1, ffi::RSMPI_INT32_T, ffi::RSMPI_MIN, place.communicator)
    };
    check(call, reduced)?;
    Ok(all == 1)
}

/// Memory of `bytes` for each rank, which ends with the process: giving it back would need all ranks at once.
fn allocate(place: Place, call: Call, bytes: usize) -> Result<ffi::MPI_Win> {
    let mut own: *mut c_void = null_mut();
    // SAFETY: every rank of the communicator, which is on one machine, comes here with the same size; the results have a place.
    unsafe {
        let mut window = std::mem::zeroed();
        let (base, info) = ((&raw mut own).cast(), ffi::RSMPI_INFO_NULL);
        check(call, ffi::MPI_Win_allocate_shared(bytes as ffi::MPI_Aint, 1, info, place.communicator, base, &mut window))?;
        // Loads and stores of the others' memory are allowed from here on.
        check(call, ffi::MPI_Win_lock_all(ffi::MPI_MODE_NOCHECK as c_int, window))?;
        Ok(window)
    }
}

fn area(window: ffi::MPI_Win, call: Call, rank: usize) -> Result<*mut c_void> {
    let (mut bytes, mut unit, mut base): (ffi::MPI_Aint, c_int, *mut c_void) = (0, 0, null_mut());
    // SAFETY: the window is valid and has this rank; the results have a place.
    check(call, unsafe { ffi::MPI_Win_shared_query(window, rank as c_int, &mut bytes, &mut unit, (&raw mut base).cast()) })?;
    Ok(base)
}
