//! What becomes of one tensor in a collective, piece by piece: each slice has an owner that gets
//! every peer's piece of it, sums them as the pairwise tree says while they are in cache, and hands
//! the sum on.

use tch::Tensor;

use super::super::ReduceOp;
use super::{Channel, Membership, Pending, SharedBuffer, Span};
use crate::error::Result;

/// Largest piece. Over shared memory 128 KiB was the fastest for 256 MB between two ranks, by a few
/// per cent over 64 and 256 KiB; by messages, 128 and 256 KiB were.
pub const PIECE_BYTES: usize = 128 << 10;

/// Rounds whose pieces are received while an earlier one is summed.
pub const WINDOW: usize = 2;

/// Most memory for pieces of peers; with many ranks, pieces become smaller instead.
const SCRATCH_BYTES: usize = 4 << 20;

/// Up to this size, over all ranks, each rank receives and sums everything: one trip instead of
/// two.
const SMALL_BYTES: usize = 64 << 10;

/// A slice begins at a multiple of this, where vectors and cache lines do.
const SLICE_ELEMENTS: usize = 64;

/// The smallest unit of scratch memory, so that each peer's piece begins on a cache line.
pub const LINE_BYTES: usize = 64;

/// Bytes of a piece: with all the rooms for pieces, scratch memory keeps to its limit.
pub fn piece_bytes(world_size: usize) -> usize {
    (SCRATCH_BYTES / WINDOW / world_size / LINE_BYTES * LINE_BYTES).clamp(LINE_BYTES, PIECE_BYTES)
}

/// The rank that sends to `rank`, and those that it sends to, in the binomial tree below `root`.
fn tree(
    rank: usize,
    world_size: usize,
    root: usize,
) -> (Option<usize>, impl Iterator<Item = usize>) {
    let position = (rank + world_size - root) % world_size;
    // The root sends to positions 1, 2, 4, …; every other position hears from itself without its lowest
    // bit.
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

/// What becomes of a tensor.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    /// Every rank receives and reduces all of it.
    Everywhere(ReduceOp),
    /// Each rank reduces its slice.
    Owned(ReduceOp),
    /// Each rank reduces its slice and sends the result to all.
    Shared(ReduceOp),
    /// Each rank sends its slice to all.
    Gathered,
    /// The root's tensor goes down a binomial tree.
    From(usize),
}

impl Pattern {
    /// How a tensor of this size is reduced on every rank.
    pub fn all_reduce(op: ReduceOp, tensor: &Tensor, world_size: usize) -> Self {
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if bytes * world_size <= SMALL_BYTES {
            Pattern::Everywhere(op)
        } else {
            Pattern::Shared(op)
        }
    }
}

/// One tensor of an operation.
pub struct TensorPlan {
    pattern: Pattern,
    full: Span,
    /// Elements of a slice; slices at the end may have fewer.
    slice: usize,
    /// Where this rank's slice comes from or ends up, in `full` or not.
    owned: Span,
    /// Elements of a piece.
    step: usize,
}

/// How the pieces of one round come from the peers and go to them.
pub struct Round<'r, W> {
    pub membership: Membership,
    pub channel: &'r W,
    pub shared_buffer: Option<&'r SharedBuffer>,
    pub scratch: Scratch<'r>,
    pub number: usize,
}

impl<W> Round<'_, W> {
    /// Whether pieces of this pattern travel over the shared buffer. A broadcast has its tree, and small
    /// tensors one trip.
    fn shared_buffer(&self, pattern: Pattern) -> Option<&SharedBuffer> {
        self.shared_buffer.filter(|_| {
            matches!(pattern, Pattern::Owned(_) | Pattern::Shared(_) | Pattern::Gathered)
        })
    }

    /// Where the piece of `peer` that will be added to `mine` arrives.
    fn piece_of(&self, pattern: Pattern, peer: usize, mine: Span) -> Span {
        match self.shared_buffer(pattern) {
            Some(shared_buffer) => {
                shared_buffer.between(peer, self.membership.rank, self.number, mine)
            }
            None => self.scratch.of_peer(peer, mine),
        }
    }
}

impl TensorPlan {
    /// A tensor of which every rank gets all.
    pub fn whole(
        membership: Membership,
        piece_bytes: usize,
        pattern: Pattern,
        tensor: &Tensor,
    ) -> Self {
        let full = Span::of_tensor(tensor);
        let slice = match pattern {
            Pattern::Everywhere(_) | Pattern::From(_) => full.elements,
            _ => full.elements.div_ceil(membership.world_size).next_multiple_of(SLICE_ELEMENTS),
        };
        let owned =
            if slice == full.elements { full } else { full.part(membership.rank * slice, slice) };
        TensorPlan {
            pattern,
            full,
            slice,
            owned,
            step: piece_bytes / full.kind.elt_size_in_bytes(),
        }
    }

    /// Slices of equal size. `None` if `owned` is a view of `full` at another place than its own.
    pub fn sliced(
        membership: Membership,
        piece_bytes: usize,
        pattern: Pattern,
        owned: &Tensor,
        full: &Tensor,
    ) -> Option<Self> {
        let (owned, full) = (Span::of_tensor(owned), Span::of_tensor(full));
        let slice = owned.elements;
        let sound = owned.is(full.part(membership.rank * slice, slice)) || !owned.overlaps(full);
        sound.then(|| TensorPlan {
            pattern,
            full,
            slice,
            owned,
            step: piece_bytes / full.kind.elt_size_in_bytes(),
        })
    }

    /// Bytes of a piece that a peer sends to be reduced, where it needs a place of this rank's.
    pub fn scratch_bytes(&self, has_shared_buffer: bool) -> usize {
        match self.pattern {
            Pattern::Owned(_) | Pattern::Shared(_) if has_shared_buffer => 0,
            Pattern::Everywhere(_) | Pattern::Owned(_) | Pattern::Shared(_) => {
                self.full.part(0, self.slice.min(self.step)).bytes()
            }
            Pattern::Gathered | Pattern::From(_) => 0,
        }
    }

    /// First elements of the pieces into which slices are cut.
    pub fn rounds(&self) -> impl Iterator<Item = usize> {
        (0..self.slice.min(self.full.elements)).step_by(self.step)
    }

    /// What rank `owner` owns of the round that begins at element `start` of each slice.
    fn piece(&self, owner: usize, start: usize) -> Span {
        match self.pattern {
            Pattern::Everywhere(_) | Pattern::From(_) => self.full.part(start, self.step),
            _ => self.full.part(owner * self.slice, self.slice).part(start, self.step),
        }
    }

    /// Starts what this rank's piece needs of the peers, and they of this rank.
    pub fn collect<W: Channel>(&self, round: &Round<'_, W>, start: usize) -> Result<Pending<W>> {
        let (membership, channel, mut pending) =
            (round.membership, round.channel, Pending::default());
        match (self.pattern, round.shared_buffer(self.pattern)) {
            (pattern, Some(shared_buffer)) => {
                membership.peers().try_for_each(|peer| pending.hear(channel, peer))?;
                for peer in membership.peers() {
                    let piece = self.piece(peer, start);
                    if !matches!(pattern, Pattern::Gathered) {
                        shared_buffer
                            .between(membership.rank, peer, round.number, piece)
                            .stream_from(piece);
                    }
                    pending.tell(channel, peer)?;
                }
            }
            (Pattern::Everywhere(_) | Pattern::Owned(_) | Pattern::Shared(_), None) => {
                let mine = self.piece(membership.rank, start);
                membership.peers().try_for_each(|peer| {
                    pending.receive(channel, round.scratch.of_peer(peer, mine), peer)
                })?;
                membership
                    .peers()
                    .try_for_each(|peer| pending.send(channel, self.piece(peer, start), peer))?;
            }
            (Pattern::From(root), None) => {
                let parent = tree(membership.rank, membership.world_size, root).0;
                parent.into_iter().try_for_each(|parent| {
                    pending.receive(channel, self.piece(root, start), parent)
                })?;
            }
            (Pattern::Gathered, None) => (),
        }
        Ok(pending)
    }

    /// Makes this rank's piece what it must become, once what it needs is here.
    pub fn settle<W>(&self, round: &Round<'_, W>, start: usize) {
        let (membership, mine) = (round.membership, self.piece(round.membership.rank, start));
        if mine.elements == 0 {
            return;
        }
        match self.pattern {
            Pattern::Everywhere(op) | Pattern::Owned(op) | Pattern::Shared(op) => {
                let brought = |rank| {
                    if rank == membership.rank {
                        mine
                    } else {
                        round.piece_of(self.pattern, rank, mine)
                    }
                };
                let all: Vec<Tensor> =
                    (0..membership.world_size).map(|rank| brought(rank).tensor()).collect();
                reduce(all, op, self.owned.part(start, self.step).tensor());
            }
            Pattern::Gathered if !self.owned.part(start, self.step).is(mine) => {
                mine.copy_from(self.owned.part(start, self.step))
            }
            Pattern::Gathered | Pattern::From(_) => (),
        }
    }

    /// Starts to hand settled pieces on.
    pub fn share<W: Channel>(&self, round: &Round<'_, W>, start: usize) -> Result<Pending<W>> {
        let (membership, channel, mut pending) =
            (round.membership, round.channel, Pending::default());
        let mine = self.piece(membership.rank, start);
        match (self.pattern, round.shared_buffer(self.pattern)) {
            (pattern, Some(shared_buffer)) => {
                membership.peers().try_for_each(|peer| pending.hear(channel, peer))?;
                if !matches!(pattern, Pattern::Owned(_)) {
                    shared_buffer.for_all(membership.rank, round.number, mine).stream_from(mine);
                    for peer in membership.peers() {
                        let piece = self.piece(peer, start);
                        pending.then_copy(shared_buffer.for_all(peer, round.number, piece), piece);
                    }
                }
                membership.peers().try_for_each(|peer| pending.tell(channel, peer))?;
            }
            (Pattern::Shared(_) | Pattern::Gathered, None) => {
                membership
                    .peers()
                    .try_for_each(|peer| pending.receive(channel, self.piece(peer, start), peer))?;
                membership.peers().try_for_each(|peer| pending.send(channel, mine, peer))?;
            }
            (Pattern::From(root), None) => {
                tree(membership.rank, membership.world_size, root)
                    .1
                    .try_for_each(|child| pending.send(channel, mine, child))?;
            }
            (Pattern::Everywhere(_) | Pattern::Owned(_), None) => (),
        }
        Ok(pending)
    }
}

/// The pairwise tree over the ranks' pieces, each sum in the place of its left half, the last one
/// in `result`.
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
    /// Bytes for each rank, of all slots the same.
    pub bytes: usize,
    pub world_size: usize,
}

impl Scratch<'_> {
    /// Where the piece of `peer` that will be added to `mine` arrives.
    fn of_peer(&self, peer: usize, mine: Span) -> Span {
        Span::within(
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
