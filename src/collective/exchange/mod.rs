//! The collectives as messages from rank to rank: one algorithm, whatever carries the messages.
//!
//! `exchange/tensor_plan.rs` says what becomes of a tensor, `exchange/rounds.rs` walks through an
//! operation's pieces, `exchange/queue.rs` keeps operations in order, `exchange/shared_buffer.rs` places
//! pieces in memory that ranks share, and `exchange/span.rs` has the addresses. A backend brings
//! a [`Transport`] and its [`Channel`]: what a communicator is, and how bytes travel.
//!
//! Nothing travels until somebody waits: neither MPI nor a socket moves data by itself. So
//! communication hides behind no computation here, and a thread that made it would gain nothing: it
//! takes from the computation the core that it would have had (with two ranks on two cores, half of
//! it). Works that are let go are carried out by the next wait.

mod queue;
mod rounds;
mod shared_buffer;
mod span;
mod tensor_plan;

use std::cell::RefCell;
use std::rc::Rc;

use tch::{Device, Tensor};

use super::call::Call;
use super::ledger::{Ledger, Signature};
use super::{Collective, Issued, Meter, ReduceOp, Sliced, Spent, Work};
use crate::error::{Error, Result};
use queue::Queue;
use rounds::Rounds;
pub use shared_buffer::{SLOTS, SharedBuffer};
pub use span::Span;
pub use tensor_plan::{LINE_BYTES, PIECE_BYTES};
use tensor_plan::{Pattern, TensorPlan, piece_bytes};

/// This rank among those of a communicator.
#[derive(Clone, Copy)]
pub struct Membership {
    pub rank: usize,
    pub world_size: usize,
}

impl Membership {
    pub fn peers(self) -> impl Iterator<Item = usize> {
        (1..self.world_size).map(move |distance| (self.rank + distance) % self.world_size)
    }
}

/// What carries the messages of one operation. Messages of one rank to another arrive in the order
/// in which they left, and are received in that order; ranks count as the operation's communicator
/// counts them.
///
/// Whoever calls it keeps the memory of a span until the message was waited for, and neither
/// writes what is sent nor touches what is received before.
///
/// # Errors
/// [`Error::Desync`] for a message of another operation, [`Error::Peer`] if a peer said that it
/// failed, [`Error::Collective`] for everything else.
pub trait Channel {
    /// Messages that were started.
    type Messages: Default;

    /// Starts to send; the span is not empty.
    fn send(&self, messages: &mut Self::Messages, span: Span, peer: usize) -> Result<()>;

    /// Starts to receive; the span is not empty.
    fn receive(&self, messages: &mut Self::Messages, span: Span, peer: usize) -> Result<()>;

    /// Starts to tell a peer that something is done: what was written to shared memory before is
    /// seen by who hears of it.
    fn tell(&self, messages: &mut Self::Messages, peer: usize) -> Result<()>;

    /// Starts to listen for what a peer tells.
    fn hear(&self, messages: &mut Self::Messages, peer: usize) -> Result<()>;

    /// Blocks until every message has arrived or left.
    fn wait(&self, messages: &mut Self::Messages) -> Result<()>;
}

/// A communicator as its backend knows it.
pub trait Transport: Sized + 'static {
    type Channel: Channel + 'static;

    const BACKEND: &'static str;

    fn membership(&self) -> Membership;

    /// Memory that its ranks share, if they do.
    fn shared_buffer(&self) -> Option<&Rc<SharedBuffer>>;

    /// What carries the operation that left the ledger in this state.
    fn channel(&self, call: Call, issued: Issued) -> Self::Channel;

    /// Returns once every rank is here. Nothing is under way.
    fn meet(&self, call: Call, issued: Issued) -> Result<()>;

    /// The communicator of the ranks with this color. Nothing is under way.
    fn split(whole: &Communicator<Self>, call: Call, color: usize) -> Result<Self>;
}

/// Messages under way that are waited for together, and what is done when all have arrived.
pub struct Pending<W: Channel> {
    messages: W::Messages,
    /// What is copied, from and to.
    copies: Vec<(Span, Span)>,
}

impl<W: Channel> Default for Pending<W> {
    fn default() -> Self {
        Pending { messages: W::Messages::default(), copies: Vec::new() }
    }
}

impl<W: Channel> Pending<W> {
    /// Of nothing no message is made.
    fn send(&mut self, channel: &W, span: Span, peer: usize) -> Result<()> {
        if span.elements == 0 { Ok(()) } else { channel.send(&mut self.messages, span, peer) }
    }

    /// Of nothing no message is made.
    fn receive(&mut self, channel: &W, span: Span, peer: usize) -> Result<()> {
        if span.elements == 0 { Ok(()) } else { channel.receive(&mut self.messages, span, peer) }
    }

    fn tell(&mut self, channel: &W, peer: usize) -> Result<()> {
        channel.tell(&mut self.messages, peer)
    }

    fn hear(&mut self, channel: &W, peer: usize) -> Result<()> {
        channel.hear(&mut self.messages, peer)
    }

    /// Once everything has arrived, `from` is copied to `to`.
    fn then_copy(&mut self, from: Span, to: Span) {
        self.copies.push((from, to));
    }

    fn wait(&mut self, channel: &W) -> Result<()> {
        channel.wait(&mut self.messages)?;
        self.copies.drain(..).for_each(|(from, to)| to.stream_from(from));
        Ok(())
    }
}

/// This process as a rank of a communicator. It stays on its thread, as its queue does.
pub struct Communicator<L: Transport> {
    pub(super) transport: L,
    queue: Rc<RefCell<Queue<L::Channel>>>,
    ledger: Ledger,
    meter: Meter,
}

impl<L: Transport> Communicator<L> {
    /// A world of its own.
    pub(super) fn new(transport: L) -> Self {
        Communicator {
            transport,
            queue: Rc::default(),
            ledger: Ledger::default(),
            meter: Meter::default(),
        }
    }

    fn call(operation: &'static str) -> Call {
        Call { backend: L::BACKEND, operation }
    }

    /// Queues an operation; the work carries it out, after those before it.
    fn issue(
        &self,
        call: Call,
        signature: Signature,
        plans: Vec<TensorPlan>,
        tensors: Vec<Tensor>,
    ) -> Work {
        let channel = self.transport.channel(call, self.ledger.enter(signature));
        let operation = Rounds::new(
            self.transport.membership(),
            self.transport.shared_buffer().cloned(),
            channel,
            plans,
            tensors,
        );
        let number = self.queue.borrow_mut().push(operation);
        let (queue, meter) = (self.queue.clone(), self.meter.clone());
        Work::new(move || meter.exposed(|| queue.borrow_mut().finish(call, number)))
    }

    /// Bytes of a piece on the way between these ranks.
    fn piece_bytes(&self) -> usize {
        self.transport.shared_buffer().map_or_else(
            || piece_bytes(self.transport.membership().world_size),
            |shared_buffer| shared_buffer.piece_bytes,
        )
    }

    fn plan(&self, call: Call, pattern: Pattern, sliced: &Sliced) -> Result<TensorPlan> {
        call.check_slices(sliced, self.world_size())?;
        check_device(call, &sliced.full)?;
        TensorPlan::sliced(
            self.transport.membership(),
            self.piece_bytes(),
            pattern,
            &sliced.owned,
            &sliced.full,
        )
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

impl<L: Transport> Collective for Communicator<L> {
    fn rank(&self) -> usize {
        self.transport.membership().rank
    }

    fn world_size(&self) -> usize {
        self.transport.membership().world_size
    }

    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work> {
        let (call, membership) = (Self::call("all_reduce"), self.transport.membership());
        let plan = |buffer: &Tensor| {
            call.check_buffer(buffer)?;
            check_device(call, buffer)?;
            Ok(TensorPlan::whole(
                membership,
                self.piece_bytes(),
                Pattern::all_reduce(op, buffer, membership.world_size),
                buffer,
            ))
        };
        let plans = buffers.iter().map(plan).collect::<Result<_>>()?;
        Ok(self.issue(call, Signature::new("all_reduce", &buffers).by(op), plans, buffers))
    }

    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        let call = Self::call("reduce_scatter");
        let plans = tensors
            .iter()
            .map(|sliced| self.plan(call, Pattern::Owned(op), sliced))
            .collect::<Result<_>>()?;
        let signature =
            Signature::new("reduce_scatter", tensors.iter().map(|sliced| &sliced.full)).by(op);
        Ok(self.issue(call, signature, plans, flat(tensors)))
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        let call = Self::call("all_gather");
        let plans = tensors
            .iter()
            .map(|sliced| self.plan(call, Pattern::Gathered, sliced))
            .collect::<Result<_>>()?;
        let signature = Signature::new("all_gather", tensors.iter().map(|sliced| &sliced.full));
        Ok(self.issue(call, signature, plans, flat(tensors)))
    }

    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work> {
        let (call, membership) = (Self::call("broadcast"), self.transport.membership());
        call.check_buffer(&buffer)?;
        call.check_root(root, membership.world_size)?;
        check_device(call, &buffer)?;
        let plans =
            vec![TensorPlan::whole(membership, self.piece_bytes(), Pattern::From(root), &buffer)];
        Ok(self.issue(
            call,
            Signature::new("broadcast", [&buffer]).rooted_at(root),
            plans,
            vec![buffer],
        ))
    }

    fn barrier(&self) -> Result<()> {
        let call = Self::call("barrier");
        self.queue.borrow_mut().drain(call)?;
        self.transport.meet(call, self.ledger.enter(Signature::new("barrier", [])))
    }

    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        let call = Self::call("split");
        self.queue.borrow_mut().drain(call)?;
        self.ledger.enter(Signature::new("split", []));
        let transport = L::split(self, call, color)?;
        Ok(Box::new(Communicator { queue: self.queue.clone(), ..Communicator::new(transport) }))
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
