//! One collective, carried out in rounds of pieces that fit into the cache.
//!
//! MPI's own reductions sum in an order that the library chooses, lack bf16, and need each buffer
//! in full twice. Here a rank needs a few MiB of scratch memory besides its tensors, whatever their
//! size, and sums are written to where they are needed.

use std::collections::VecDeque;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::tensor_plan::{LINE_BYTES, Round, Scratch, TensorPlan, WINDOW};
use super::{Channel, Membership, Pending, SharedBuffer};
use crate::error::Result;

/// One collective that was issued and is not finished: its tensors, and the plan of each.
pub struct Rounds<C> {
    membership: Membership,
    channel: C,
    shared_buffer: Option<Rc<SharedBuffer>>,
    plans: Vec<TensorPlan>,
    /// Kept alive because the plans hold addresses inside them.
    tensors: Vec<Tensor>,
}

/// A piece whose messages from the peers are under way.
struct Collecting<'r, C: Channel> {
    plan: &'r TensorPlan,
    start: usize,
    round: Round<'r, C>,
    pending: Pending<C>,
}

impl<C: Channel> Rounds<C> {
    /// `tensors` are those that `plans` were made from.
    pub fn new(
        membership: Membership,
        shared_buffer: Option<Rc<SharedBuffer>>,
        channel: C,
        plans: Vec<TensorPlan>,
        tensors: Vec<Tensor>,
    ) -> Self {
        Rounds { membership, channel, shared_buffer, plans, tensors }
    }

    /// Carries out the collective together with the other ranks.
    ///
    /// The pieces of a round are transferred while the previous round's are reduced. All ranks walk
    /// through the same rounds, so messages leave in the order in which the peer receives them.
    pub fn run(&self, memory: &mut Option<Tensor>) -> Result<()> {
        let bytes = self.scratch_bytes();
        let memory = grown(memory, WINDOW * self.membership.world_size * bytes);
        let (mut collecting, mut sharing) = (VecDeque::new(), VecDeque::new());
        let pieces =
            self.plans.iter().flat_map(|plan| plan.rounds().map(move |start| (plan, start)));
        for (number, (plan, start)) in pieces.enumerate() {
            let round = self.round(number, memory, bytes);
            let pending = plan.collect(&round, start)?;
            collecting.push_back(Collecting { plan, start, round, pending });
            if collecting.len() == WINDOW
                && let Some(oldest) = collecting.pop_front()
            {
                self.settle(oldest, &mut sharing)?;
            }
        }
        collecting.into_iter().try_for_each(|oldest| self.settle(oldest, &mut sharing))?;
        sharing.into_iter().try_for_each(|mut pending| pending.wait(&self.channel))
    }

    fn round<'r>(&'r self, number: usize, memory: &'r Tensor, bytes: usize) -> Round<'r, C> {
        let membership = self.membership;
        let (slot, world_size) = (number % WINDOW, membership.world_size);
        Round {
            membership,
            channel: &self.channel,
            shared_buffer: self.shared_buffer.as_deref(),
            scratch: Scratch { memory, slot, bytes, world_size },
            number,
        }
    }

    /// Waits for a piece's messages, reduces it and starts to share it. At most `WINDOW` pieces are
    /// being shared at a time.
    fn settle(
        &self,
        mut oldest: Collecting<'_, C>,
        sharing: &mut VecDeque<Pending<C>>,
    ) -> Result<()> {
        oldest.pending.wait(&self.channel)?;
        oldest.plan.settle(&oldest.round, oldest.start);
        sharing.push_back(oldest.plan.share(&oldest.round, oldest.start)?);
        if sharing.len() <= WINDOW {
            return Ok(());
        }
        sharing.pop_front().map_or(Ok(()), |mut pending| pending.wait(&self.channel))
    }

    /// Drops this operation but leaks its tensors, because peers may still read or write them.
    pub fn abandon(self) {
        std::mem::forget(self.tensors);
    }

    /// Bytes of the largest piece that a peer sends to be reduced.
    fn scratch_bytes(&self) -> usize {
        let has_shared_buffer = self.shared_buffer.is_some();
        let pieces = self.plans.iter().map(|plan| plan.scratch_bytes(has_shared_buffer));
        pieces.max().unwrap_or(0).next_multiple_of(LINE_BYTES)
    }
}

/// Returns scratch memory of at least `bytes`, reallocated if it is too small.
fn grown(memory: &mut Option<Tensor>, bytes: usize) -> &Tensor {
    let kept = memory.take().filter(|memory| memory.numel() >= bytes);
    memory.insert(kept.unwrap_or_else(|| Tensor::empty([bytes as i64], (Kind::Uint8, Device::Cpu))))
}
