//! Memory that the ranks of one machine share: a piece is written there once and summed or copied
//! from there, where a message would be copied into a library and out of it again.
//!
//! An empty message still goes from rank to rank for each piece: it says that the piece is there,
//! keeps the order, carries the tag by which ranks notice that they disagree, and takes whatever
//! the channel has to say of a dead peer.

use std::ffi::c_void;

use super::{Membership, Span};

/// Rounds after which a slot is written anew. When a rank begins a round it has received, and so
/// every peer has used, all pieces up to this many rounds before.
pub const SLOTS: usize = 4;

/// Slots of all ranks: of each rank [`SLOTS`] for each peer's pieces, and as many for what it hands
/// to all.
pub struct SharedBuffer {
    membership: Membership,
    /// Bytes of a slot.
    pub piece_bytes: usize,
    /// Where each rank's slots begin.
    areas: Vec<*mut c_void>,
}

impl SharedBuffer {
    /// Of memory that every rank sees: at each address of `areas` are `SLOTS * (world_size + 1)`
    /// pieces of room.
    pub fn over(membership: Membership, piece_bytes: usize, areas: Vec<*mut c_void>) -> Self {
        SharedBuffer { membership, piece_bytes, areas }
    }

    /// Where rank `from` puts its piece of a round for rank `to`; for a piece of this size and
    /// kind.
    pub fn between(&self, from: usize, to: usize, round: usize, piece: Span) -> Span {
        self.slot(from, to, round, piece)
    }

    /// Where rank `from` puts what it hands to all.
    pub fn for_all(&self, from: usize, round: usize, piece: Span) -> Span {
        self.slot(from, self.membership.world_size, round, piece)
    }

    fn slot(&self, of: usize, column: usize, round: usize, piece: Span) -> Span {
        debug_assert!(piece.bytes() <= self.piece_bytes);
        let slot = column * SLOTS + round % SLOTS;
        Span::from_address(
            self.areas[of].wrapping_byte_add(slot * self.piece_bytes),
            piece.elements,
            piece.kind,
        )
    }
}
