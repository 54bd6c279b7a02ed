//! The plan of one tensor in a collective, piece by piece. Each slice of the tensor has an owner,
//! which receives every peer's piece of it, sums the pieces in the order of the pairwise tree while
//! they are in the cache, and sends the sum on.

use tch::Tensor;

use super::super::ReduceOp;
use super::{Channel, Membership, Pending, SharedBuffer, Span};
use crate::error::Result;

/// Largest piece. Through shared memory 128 KiB was the fastest for 256 MB between two ranks, by a
/// few per cent over 64 and 256 KiB; by messages, 128 and 256 KiB were.
pub const PIECE_BYTES: usize = 128 << 10;

/// Rounds whose pieces may be in transit while an earlier one is reduced.
pub const WINDOW: usize = 2;

/// Most scratch memory for the pieces of peers; with many ranks, pieces become smaller instead.
const SCRATCH_BYTES: usize = 4 << 20;

/// Up to this many bytes, summed over all ranks, each rank receives and reduces everything: one
/// network latency instead of two.
const SMALL_BYTES: usize = 64 << 10;

/// Slices start at a multiple of this, so that vectors and cache lines are aligned.
const SLICE_ELEMENTS: usize = 64;

/// Bytes of a cache line: the unit of scratch memory, so that each peer's piece starts on a line of
/// its own.
pub const LINE_BYTES: usize = 64;

/// Bytes of a piece, such that the pieces of all peers in all `WINDOW` rounds fit into the scratch
/// memory.
pub fn piece_bytes(world_size: usize) -> usize {
    (SCRATCH_BYTES / WINDOW / world_size / LINE_BYTES * LINE_BYTES).clamp(LINE_BYTES, PIECE_BYTES)
}

/// The parent and the children of `rank` in the binomial tree below `root`.
fn tree(
    rank: usize,
    world_size: usize,
    root: usize,
) -> (Option<usize>, impl Iterator<Item = usize>) {
    let position = (rank + world_size - root) % world_size;
    // The root sends to positions 1, 2, 4, …; the parent of any other position is that position
    // without its lowest set bit.
    let lowest = if position == 0 {
        world_size.next_power_of_two()
    } else {
        position & position.wrapping_neg()
    };
    let rank_at = move |position: usize| (position + root) % world_size;
    let children = (0..lowest.trailing_zeros())
        .rev()
        .map(move |bit| position + (1 << bit))
        .filter(move |child| *child < world_size);
    ((position > 0).then(|| rank_at(position - lowest)), children.map(rank_at))
}

/// How a collective treats one tensor.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    /// Every rank receives and reduces the whole tensor.
    Everywhere(ReduceOp),
    /// Each rank reduces its slice.
    Owned(ReduceOp),
    /// Each rank reduces its slice and sends the result to all.
    Shared(ReduceOp),
    /// Each rank sends its slice to all.
    Gathered,
    /// The root's tensor is sent down a binomial tree.
    Broadcast(usize),
}

impl Pattern {
    /// The pattern of an all-reduce, by the size of the tensor.
    pub fn all_reduce(op: ReduceOp, tensor: &Tensor, world_size: usize) -> Self {
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if bytes * world_size <= SMALL_BYTES {
            Pattern::Everywhere(op)
        } else {
            Pattern::Shared(op)
        }
    }
}

/// The plan of one tensor in one operation.
pub struct TensorPlan {
    pattern: Pattern,
    full: Span,
    /// Elements of a slice; the last slices may have fewer.
    slice: usize,
    /// This rank's slice as the caller passed it: input of a gather or output of a reduction. May
    /// be a part of `full`.
    owned: Span,
    /// Elements of a piece.
    piece_elements: usize,
}

/// The transfer of one piece of every slice: the channel, the buffers, and the number by which
/// ranks choose the same slots.
pub struct Round<'r, C> {
    pub membership: Membership,
    pub channel: &'r C,
    pub shared_buffer: Option<&'r SharedBuffer>,
    pub scratch: Scratch<'r>,
    pub number: usize,
}

impl<C> Round<'_, C> {
    /// The shared buffer, if pieces of this pattern go through it. A broadcast uses its tree, and
    /// small tensors a single message.
    fn shared_buffer(&self, pattern: Pattern) -> Option<&SharedBuffer> {
        self.shared_buffer.filter(|_| {
            matches!(pattern, Pattern::Owned(_) | Pattern::Shared(_) | Pattern::Gathered)
        })
    }

    /// The memory in which `peer`'s contribution to `mine` arrives.
    fn contribution(&self, pattern: Pattern, peer: usize, mine: Span) -> Span {
        match self.shared_buffer(pattern) {
            Some(shared_buffer) => {
                shared_buffer.pair_slot(peer, self.membership.rank, self.number, mine)
            }
            None => self.scratch.peer_piece(peer, mine),
        }
    }
}

impl TensorPlan {
    /// Plans a tensor that every rank receives in full.
    pub fn whole(
        membership: Membership,
        piece_bytes: usize,
        pattern: Pattern,
        tensor: &Tensor,
    ) -> Self {
        let full = Span::from_tensor(tensor);
        let slice = match pattern {
            Pattern::Everywhere(_) | Pattern::Broadcast(_) => full.elements,
            _ => full.elements.div_ceil(membership.world_size).next_multiple_of(SLICE_ELEMENTS),
        };
        let owned =
            if slice == full.elements { full } else { full.part(membership.rank * slice, slice) };
        TensorPlan {
            pattern,
            full,
            slice,
            owned,
            piece_elements: piece_bytes / full.kind.elt_size_in_bytes(),
        }
    }

    /// Plans a tensor in slices of equal size. `None` if `owned` overlaps `full` elsewhere than at
    /// this rank's slice.
    pub fn sliced(
        membership: Membership,
        piece_bytes: usize,
        pattern: Pattern,
        owned: &Tensor,
        full: &Tensor,
    ) -> Option<Self> {
        let (owned, full) = (Span::from_tensor(owned), Span::from_tensor(full));
        let slice = owned.elements;
        let sound =
            owned.shares_start(full.part(membership.rank * slice, slice)) || !owned.overlaps(full);
        sound.then(|| TensorPlan {
            pattern,
            full,
            slice,
            owned,
            piece_elements: piece_bytes / full.kind.elt_size_in_bytes(),
        })
    }

    /// Bytes of a peer's piece that must be received into scratch memory.
    pub fn scratch_bytes(&self, has_shared_buffer: bool) -> usize {
        match self.pattern {
            Pattern::Owned(_) | Pattern::Shared(_) if has_shared_buffer => 0,
            Pattern::Everywhere(_) | Pattern::Owned(_) | Pattern::Shared(_) => {
                self.full.part(0, self.slice.min(self.piece_elements)).bytes()
            }
            Pattern::Gathered | Pattern::Broadcast(_) => 0,
        }
    }

    /// First elements, within a slice, of the pieces into which slices are cut.
    pub fn rounds(&self) -> impl Iterator<Item = usize> {
        (0..self.slice.min(self.full.elements)).step_by(self.piece_elements)
    }

    /// Rank `owner`'s piece that starts at element `start` of its slice.
    fn piece(&self, owner: usize, start: usize) -> Span {
        match self.pattern {
            Pattern::Everywhere(_) | Pattern::Broadcast(_) => {
                self.full.part(start, self.piece_elements)
            }
            _ => self.full.part(owner * self.slice, self.slice).part(start, self.piece_elements),
        }
    }

    /// Starts the messages that bring the peers' contributions to this rank's piece, and this
    /// rank's to theirs.
    pub fn collect<C: Channel>(&self, round: &Round<'_, C>, start: usize) -> Result<Pending<C>> {
        let (membership, channel, mut pending) =
            (round.membership, round.channel, Pending::default());
        match (self.pattern, round.shared_buffer(self.pattern)) {
            (pattern, Some(shared_buffer)) => {
                membership.peers().try_for_each(|peer| pending.receive_signal(channel, peer))?;
                for peer in membership.peers() {
                    let piece = self.piece(peer, start);
                    if !matches!(pattern, Pattern::Gathered) {
                        shared_buffer
                            .pair_slot(membership.rank, peer, round.number, piece)
                            .stream_from(piece);
                    }
                    pending.send_signal(channel, peer)?;
                }
            }
            (Pattern::Everywhere(_) | Pattern::Owned(_) | Pattern::Shared(_), None) => {
                let mine = self.piece(membership.rank, start);
                membership.peers().try_for_each(|peer| {
                    pending.receive(channel, round.scratch.peer_piece(peer, mine), peer)
                })?;
                membership
                    .peers()
                    .try_for_each(|peer| pending.send(channel, self.piece(peer, start), peer))?;
            }
            (Pattern::Broadcast(root), None) => {
                let parent = tree(membership.rank, membership.world_size, root).0;
                parent.into_iter().try_for_each(|parent| {
                    pending.receive(channel, self.piece(root, start), parent)
                })?;
            }
            (Pattern::Gathered, None) => (),
        }
        Ok(pending)
    }

    /// Reduces (or copies) this rank's piece after all peers' pieces have arrived.
    pub fn settle<C>(&self, round: &Round<'_, C>, start: usize) {
        let (membership, mine) = (round.membership, self.piece(round.membership.rank, start));
        if mine.elements == 0 {
            return;
        }
        match self.pattern {
            Pattern::Everywhere(op) | Pattern::Owned(op) | Pattern::Shared(op) => {
                let contribution = |rank| {
                    if rank == membership.rank {
                        mine
                    } else {
                        round.contribution(self.pattern, rank, mine)
                    }
                };
                let all: Vec<Tensor> =
                    (0..membership.world_size).map(|rank| contribution(rank).tensor()).collect();
                reduce(all, op, self.owned.part(start, self.piece_elements).tensor());
            }
            Pattern::Gathered
                if !self.owned.part(start, self.piece_elements).shares_start(mine) =>
            {
                mine.copy_from(self.owned.part(start, self.piece_elements))
            }
            Pattern::Gathered | Pattern::Broadcast(_) => (),
        }
    }

    /// Starts to send this rank's settled piece to the peers that need it, and to receive theirs.
    pub fn share<C: Channel>(&self, round: &Round<'_, C>, start: usize) -> Result<Pending<C>> {
        let (membership, channel, mut pending) =
            (round.membership, round.channel, Pending::default());
        let mine = self.piece(membership.rank, start);
        match (self.pattern, round.shared_buffer(self.pattern)) {
            (pattern, Some(shared_buffer)) => {
                membership.peers().try_for_each(|peer| pending.receive_signal(channel, peer))?;
                if !matches!(pattern, Pattern::Owned(_)) {
                    shared_buffer
                        .broadcast_slot(membership.rank, round.number, mine)
                        .stream_from(mine);
                    for peer in membership.peers() {
                        let piece = self.piece(peer, start);
                        pending.then_copy(
                            shared_buffer.broadcast_slot(peer, round.number, piece),
                            piece,
                        );
                    }
                }
                membership.peers().try_for_each(|peer| pending.send_signal(channel, peer))?;
            }
            (Pattern::Shared(_) | Pattern::Gathered, None) => {
                membership
                    .peers()
                    .try_for_each(|peer| pending.receive(channel, self.piece(peer, start), peer))?;
                membership.peers().try_for_each(|peer| pending.send(channel, mine, peer))?;
            }
            (Pattern::Broadcast(root), None) => {
                tree(membership.rank, membership.world_size, root)
                    .1
                    .try_for_each(|child| pending.send(channel, mine, child))?;
            }
            (Pattern::Everywhere(_) | Pattern::Owned(_), None) => (),
        }
        Ok(pending)
    }
}

/// Reduces the ranks' pieces in the order of the pairwise tree. Each sum overwrites its left
/// operand, the last one is written to `result`.
fn reduce(mut all: Vec<Tensor>, op: ReduceOp, mut result: Tensor) {
    let join = |left: &Tensor, right: &Tensor, into: &Tensor| match op {
        ReduceOp::Sum => left.add_out(into, right),
        ReduceOp::Min => left.minimum_out(into, right),
        ReduceOp::Max => left.maximum_out(into, right),
    };
    while all.len() > 2 {
        all = all
            .chunks(2)
            .map(|pair| {
                pair[1..]
                    .iter()
                    .fold(pair[0].shallow_clone(), |left, right| join(&left, right, &left))
            })
            .collect();
    }
    match &all[..] {
        [left, right] => drop(join(left, right, &result)),
        alone => result.copy_(&alone[0]),
    }
}

/// Scratch memory for the pieces of one round.
pub struct Scratch<'s> {
    pub memory: &'s Tensor,
    pub slot: usize,
    /// Bytes for each rank, the same in all slots.
    pub bytes: usize,
    pub world_size: usize,
}

impl Scratch<'_> {
    /// The memory in which `peer`'s contribution to `mine` arrives.
    fn peer_piece(&self, peer: usize, mine: Span) -> Span {
        Span::from_bytes(
            self.memory,
            (self.slot * self.world_size + peer) * self.bytes,
            mine.elements,
            mine.kind,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broadcast_reaches_every_rank_once_from_the_rank_that_sends_to_it() {
        for (world_size, root) in
            (1..=17).flat_map(|world_size| (0..world_size).map(move |root| (world_size, root)))
        {
            let mut reached = vec![root];
            for rank in 0..world_size {
                for child in tree(rank, world_size, root).1 {
                    assert_eq!(
                        tree(child, world_size, root).0,
                        Some(rank),
                        "{child} of {world_size} from {root}"
                    );
                    reached.push(child);
                }
            }
            reached.sort();
            assert_eq!(reached, (0..world_size).collect::<Vec<_>>(), "from {root}");
            assert_eq!(tree(root, world_size, root).0, None);
        }
    }

    #[test]
    fn scratch_memory_keeps_to_its_limit_however_many_ranks_there_are() {
        for world_size in 1..=1024 {
            let piece = piece_bytes(world_size);
            assert!(
                piece * WINDOW * world_size <= SCRATCH_BYTES,
                "{piece} bytes among {world_size}"
            );
        }
        assert_eq!(piece_bytes(4), PIECE_BYTES);
    }
}
