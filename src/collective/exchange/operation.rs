//! One collective, carried out in rounds of pieces that fit into caches.
//!
//! MPI's own reductions sum in an order of the library's choice, know no bf16, and want whole
//! buffers twice. Here a rank needs scratch memory of a few MiB besides its tensors, whatever their
//! size, and sums land where they belong.

use std::collections::VecDeque;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::part::{LINE_BYTES, Part, Road, Room, WINDOW};
use super::{Board, Flight, Place, Wire};
use crate::error::Result;

/// A collective that was called for: its tensors, and what becomes of them.
pub struct Operation<W> {
    place: Place,
    wire: W,
    board: Option<Rc<Board>>,
    parts: Vec<Part>,
    /// Kept for the stretches of the parts.
    tensors: Vec<Tensor>,
}

impl<W: Wire> Operation<W> {
    /// Among the ranks of the communicator at `place`; `tensors` are those that the parts were made
    /// of.
    pub fn new(
        place: Place,
        board: Option<Rc<Board>>,
        wire: W,
        parts: Vec<Part>,
        tensors: Vec<Tensor>,
    ) -> Self {
        Operation { place, wire, board, parts, tensors }
    }

    /// Carries the operation out together with the other ranks.
    ///
    /// A round's pieces are under way while the round before is summed. Messages of one rank to
    /// another leave in the order in which the other receives them: both walk through the same
    /// rounds.
    pub fn run(&self, scratch: &mut Option<Tensor>) -> Result<()> {
        let place = self.place;
        let bytes = self.scratch_bytes();
        let scratch = grown(scratch, WINDOW * place.world_size * bytes);
        let room = |round: usize| Room {
            scratch,
            slot: round % WINDOW,
            bytes,
            world_size: place.world_size,
        };
        let road = |round: usize| Road {
            place,
            wire: &self.wire,
            board: self.board.as_deref(),
            room: room(round),
            round,
        };
        let (mut collecting, mut sharing) = (VecDeque::new(), VecDeque::new());
        let mut settle =
            |(part, start, road, mut flight): (&Part, usize, Road<'_, W>, Flight<W>)| {
                flight.wait(&self.wire)?;
                part.settle(&road, start);
                sharing.push_back(part.share(&road, start)?);
                if sharing.len() > WINDOW {
                    sharing
                        .pop_front()
                        .map_or(Ok(()), |mut flight: Flight<W>| flight.wait(&self.wire))
                } else {
                    Ok(())
                }
            };
        let rounds =
            self.parts.iter().flat_map(|part| part.rounds().map(move |start| (part, start)));
        for (round, (part, start)) in rounds.enumerate() {
            let road = road(round);
            let flight = part.collect(&road, start)?;
            collecting.push_back((part, start, road, flight));
            if collecting.len() == WINDOW {
                collecting.pop_front().map_or(Ok(()), &mut settle)?;
            }
        }
        collecting.into_iter().try_for_each(settle)?;
        sharing.into_iter().try_for_each(|mut flight| flight.wait(&self.wire))
    }

    /// Gives up what is under way. Its tensors stay where they are for ever.
    pub fn abandon(self) {
        std::mem::forget(self.tensors);
    }

    /// Bytes of the largest piece that a peer sends to be reduced.
    fn scratch_bytes(&self) -> usize {
        let pieces = self.parts.iter().map(|part| part.scratch_bytes(self.board.is_some()));
        pieces.max().unwrap_or(0).next_multiple_of(LINE_BYTES)
    }
}

/// The memory, made anew if it is too small.
fn grown(scratch: &mut Option<Tensor>, bytes: usize) -> &Tensor {
    let kept = scratch.take().filter(|scratch| scratch.numel() >= bytes);
    scratch
        .insert(kept.unwrap_or_else(|| Tensor::empty([bytes as i64], (Kind::Uint8, Device::Cpu))))
}
