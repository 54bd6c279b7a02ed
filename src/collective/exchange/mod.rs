//! The collectives as messages from rank to rank: one algorithm, whatever carries the messages.
//!
//! `exchange/part.rs` says what becomes of a tensor, `exchange/operation.rs` walks through an
//! operation's pieces, `exchange/queue.rs` keeps operations in order, `exchange/board.rs` places
//! pieces in memory that ranks share, and `exchange/stretch.rs` has the addresses. A backend brings
//! a [`Link`] and its [`Wire`]: what a communicator is, and how bytes travel.
//!
//! Nothing travels until somebody waits: neither MPI nor a socket moves data by itself. So
//! communication hides behind no computation here, and a thread that made it would gain nothing: it
//! takes from the computation the core that it would have had (with two ranks on two cores, half of
//! it). Works that are let go are carried out by the next wait.

mod board;
mod operation;
mod part;
mod queue;
mod stretch;

use std::cell::RefCell;
use std::rc::Rc;

use tch::{Device, Tensor};

use super::call::Call;
use super::ledger::{Ledger, Signature};
use super::{Collective, Issued, Meter, ReduceOp, Sliced, Spent, Work};
use crate::error::{Error, Result};
pub use board::{Board, SLOTS};
use operation::Operation;
pub use part::{LINE_BYTES, PIECE_BYTES};
use part::{Part, Pattern, piece_bytes};
use queue::Queue;
pub use stretch::Stretch;

/// This rank among those of a communicator.
#[derive(Clone, Copy)]
pub struct Place {
    pub rank: usize,
    pub world_size: usize,
}

impl Place {
    pub fn peers(self) -> impl Iterator<Item = usize> {
        (1..self.world_size).map(move |distance| (self.rank + distance) % self.world_size)
    }
}

/// What carries the messages of one operation. Messages of one rank to another arrive in the order
/// in which they left, and are received in that order; ranks count as the operation's communicator
/// counts them.
///
/// Whoever calls it keeps the memory of a stretch until the message was waited for, and neither
/// writes what is sent nor touches what is received before.
///
/// # Errors
/// [`Error::Desync`] for a message of another operation, [`Error::Peer`] if a peer said that it
/// failed, [`Error::Collective`] for everything else.
pub trait Wire {
    /// Messages that were started.
    type Messages: Default;

    /// Starts to send; the stretch is not empty.
    fn send(&self, messages: &mut Self::Messages, stretch: Stretch, peer: usize) -> Result<()>;

    /// Starts to receive; the stretch is not empty.
    fn receive(&self, messages: &mut Self::Messages, stretch: Stretch, peer: usize) -> Result<()>;

    /// Starts to tell a peer that something is done: what was written to shared memory before is
    /// seen by who hears of it.
    fn tell(&self, messages: &mut Self::Messages, peer: usize) -> Result<()>;

    /// Starts to listen for what a peer tells.
    fn hear(&self, messages: &mut Self::Messages, peer: usize) -> Result<()>;

    /// Blocks until every message has arrived or left.
    fn wait(&self, messages: &mut Self::Messages) -> Result<()>;
}

/// A communicator as its backend knows it.
pub trait Link: Sized + 'static {
    type Wire: Wire + 'static;

    const BACKEND: &'static str;

    fn place(&self) -> Place;

    /// Memory that its ranks share, if they do.
    fn board(&self) -> Option<&Rc<Board>>;

    /// What carries the operation that left the ledger in this state.
    fn wire(&self, call: Call, issued: Issued) -> Self::Wire;

    /// Returns once every rank is here. Nothing is under way.
    fn meet(&self, call: Call, issued: Issued) -> Result<()>;

    /// The part of `ranks` with this color. Nothing is under way.
    fn part(ranks: &Ranks<Self>, call: Call, color: usize) -> Result<Self>;
}

/// Messages under way that are waited for together, and what is done when all have arrived.
pub struct Flight<W: Wire> {
    messages: W::Messages,
    /// What is copied, from and to.
    copies: Vec<(Stretch, Stretch)>,
}

impl<W: Wire> Default for Flight<W> {
    fn default() -> Self {
        Flight { messages: W::Messages::default(), copies: Vec::new() }
    }
}

impl<W: Wire> Flight<W> {
    /// Of nothing no message is made.
    fn send(&mut self, wire: &W, stretch: Stretch, peer: usize) -> Result<()> {
        if stretch.elements == 0 { Ok(()) } else { wire.send(&mut self.messages, stretch, peer) }
    }

    /// Of nothing no message is made.
    fn receive(&mut self, wire: &W, stretch: Stretch, peer: usize) -> Result<()> {
        if stretch.elements == 0 { Ok(()) } else { wire.receive(&mut self.messages, stretch, peer) }
    }

    fn tell(&mut self, wire: &W, peer: usize) -> Result<()> {
        wire.tell(&mut self.messages, peer)
    }

    fn hear(&mut self, wire: &W, peer: usize) -> Result<()> {
        wire.hear(&mut self.messages, peer)
    }

    /// Once everything has arrived, `from` is copied to `to`.
    fn then_copy(&mut self, from: Stretch, to: Stretch) {
        self.copies.push((from, to));
    }

    fn wait(&mut self, wire: &W) -> Result<()> {
        wire.wait(&mut self.messages)?;
        self.copies.drain(..).for_each(|(from, to)| to.stream_from(from));
        Ok(())
    }
}

/// This process as a rank of a communicator. It stays on its thread, as its queue does.
pub struct Ranks<L: Link> {
    pub(super) link: L,
    queue: Rc<RefCell<Queue<L::Wire>>>,
    ledger: Ledger,
    meter: Meter,
}

impl<L: Link> Ranks<L> {
    /// A world of its own.
    pub(super) fn of(link: L) -> Self {
        Ranks { link, queue: Rc::default(), ledger: Ledger::default(), meter: Meter::default() }
    }

    fn call(operation: &'static str) -> Call {
        Call { backend: L::BACKEND, operation }
    }

    /// Queues an operation; the work carries it out, after those before it.
    fn issue(
        &self,
        call: Call,
        signature: Signature,
        parts: Vec<Part>,
        tensors: Vec<Tensor>,
    ) -> Work {
        let wire = self.link.wire(call, self.ledger.enter(signature));
        let operation =
            Operation::new(self.link.place(), self.link.board().cloned(), wire, parts, tensors);
        let number = self.queue.borrow_mut().push(operation);
        let (queue, meter) = (self.queue.clone(), self.meter.clone());
        Work::new(move || meter.exposed(|| queue.borrow_mut().finish(call, number)))
    }

    /// Bytes of a piece on the way between these ranks.
    fn piece_bytes(&self) -> usize {
        self.link
            .board()
            .map_or_else(|| piece_bytes(self.link.place().world_size), |board| board.piece_bytes)
    }

    fn part(&self, call: Call, pattern: Pattern, sliced: &Sliced) -> Result<Part> {
        call.check_slices(sliced, self.world_size())?;
        check_device(call, &sliced.full)?;
        Part::sliced(self.link.place(), self.piece_bytes(), pattern, &sliced.owned, &sliced.full)
            .ok_or_else(|| {
                call.error("owned is a view of full at another place than this rank's slice")
            })
    }
}

fn check_device(call: Call, tensor: &Tensor) -> Result<()> {
    match tensor.device() {
        Device::Cpu => Ok(()),
        other => Err(call.error(format!("cannot carry a tensor on {other:?}, only on the CPU"))),
    }
}

/// A whole one and its slice, of each.
fn flat(tensors: Vec<Sliced>) -> Vec<Tensor> {
    tensors.into_iter().flat_map(|sliced| [sliced.owned, sliced.full]).collect()
}

impl<L: Link> Collective for Ranks<L> {
    fn rank(&self) -> usize {
        self.link.place().rank
    }

    fn world_size(&self) -> usize {
        self.link.place().world_size
    }

    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work> {
        let (call, place) = (Self::call("all_reduce"), self.link.place());
        let part = |buffer: &Tensor| {
            call.check_buffer(buffer)?;
            check_device(call, buffer)?;
            Ok(Part::whole(
                place,
                self.piece_bytes(),
                Pattern::all_reduce(op, buffer, place.world_size),
                buffer,
            ))
        };
        let parts = buffers.iter().map(part).collect::<Result<_>>()?;
        Ok(self.issue(call, Signature::of("all_reduce", &buffers).by(op), parts, buffers))
    }

    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        let call = Self::call("reduce_scatter");
        let parts = tensors
            .iter()
            .map(|sliced| self.part(call, Pattern::Owned(op), sliced))
            .collect::<Result<_>>()?;
        let signature =
            Signature::of("reduce_scatter", tensors.iter().map(|sliced| &sliced.full)).by(op);
        Ok(self.issue(call, signature, parts, flat(tensors)))
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        let call = Self::call("all_gather");
        let parts = tensors
            .iter()
            .map(|sliced| self.part(call, Pattern::Gathered, sliced))
            .collect::<Result<_>>()?;
        let signature = Signature::of("all_gather", tensors.iter().map(|sliced| &sliced.full));
        Ok(self.issue(call, signature, parts, flat(tensors)))
    }

    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work> {
        let (call, place) = (Self::call("broadcast"), self.link.place());
        call.check_buffer(&buffer)?;
        call.check_root(root, place.world_size)?;
        check_device(call, &buffer)?;
        let parts = vec![Part::whole(place, self.piece_bytes(), Pattern::From(root), &buffer)];
        Ok(self.issue(
            call,
            Signature::of("broadcast", [&buffer]).rooted_at(root),
            parts,
            vec![buffer],
        ))
    }

    fn barrier(&self) -> Result<()> {
        let call = Self::call("barrier");
        self.queue.borrow_mut().drain(call)?;
        self.link.meet(call, self.ledger.enter(Signature::of("barrier", [])))
    }

    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        let call = Self::call("split");
        self.queue.borrow_mut().drain(call)?;
        self.ledger.enter(Signature::of("split", []));
        let link = L::part(self, call, color)?;
        Ok(Box::new(Ranks { queue: self.queue.clone(), ..Ranks::of(link) }))
    }

    fn carries(&self, device: Device) -> bool {
        device == Device::Cpu
    }

    fn spent(&self) -> Spent {
        self.meter.take()
    }

    fn issued(&self) -> Issued {
        self.ledger.issued()
    }
}

/// What one rank is told of another that is elsewhere: `theirs` and `ours` name operations.
pub fn disagreement(peer: usize, theirs: &str, rank: usize, ours: &str) -> Error {
    let what = match theirs == ours {
        true => format!(
            "ranks disagree: rank {peer} is at {theirs} like rank {rank}, but came there by other operations"
        ),
        false => format!("ranks disagree: rank {peer} is at {theirs}, rank {rank} at {ours}"),
    };
    Error::Desync { what }
}
