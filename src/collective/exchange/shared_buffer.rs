//! Memory that the ranks of one machine share. A piece is written there once and reduced or copied
//! from there, where a message would be copied into a library and out of it again.
//!
//! Each piece still comes with an empty message from rank to rank. It signals that the piece is
//! there, keeps the order, carries the tag by which ranks detect that they are at different
//! operations, and fails if the peer is dead.

use std::ffi::c_void;

use super::{Membership, Span};

/// Rounds after which a slot is reused. When a rank starts a round it has received all pieces from
/// this many rounds before, and so every peer has read them.
pub const SLOTS: usize = 4;

/// The slots of all ranks. Each rank writes to [`SLOTS`] slots for each peer, and to as many that
/// all peers read.
pub struct SharedBuffer {
    membership: Membership,
    /// Bytes of a slot.
    pub piece_bytes: usize,
    /// Start address of each rank's slots.
    areas: Vec<*mut c_void>,
}

impl SharedBuffer {
    /// A buffer over memory that every rank maps. Each address of `areas` is the start of `SLOTS *
    /// (world_size + 1)` slots of `piece_bytes`.
    pub fn new(membership: Membership, piece_bytes: usize, areas: Vec<*mut c_void>) -> Self {
        SharedBuffer { membership, piece_bytes, areas }
    }

    /// The memory through which rank `from` passes its piece of a round to rank `to`. `piece` gives
    /// the number and kind of elements.
    pub fn pair_slot(&self, from: usize, to: usize, round: usize, piece: Span) -> Span {
        self.slot(from, to, round, piece)
    }

    /// The memory through which rank `from` passes its piece of a round to all ranks.
    pub fn broadcast_slot(&self, from: usize, round: usize, piece: Span) -> Span {
        self.slot(from, self.membership.world_size, round, piece)
    }

    fn slot(&self, writer: usize, column: usize, round: usize, piece: Span) -> Span {
        debug_assert!(piece.bytes() <= self.piece_bytes);
        let slot = column * SLOTS + round % SLOTS;
        Span::from_address(
            self.areas[writer].wrapping_byte_add(slot * self.piece_bytes),
            piece.elements,
            piece.kind,
        )
    }
}
