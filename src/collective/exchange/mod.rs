//! Collectives built from point-to-point messages: one algorithm for every transport that carries
//! messages between CPU tensors.
//!
//! ```text
//!  all_reduce(tensors, op)                                Work::wait()
//!         |                                                    |
//!         v                                                    v
//!  +- Communicator -----------+        +- Queue -----------------------------+
//!  | checks the arguments     |  push  | Rounds, Rounds, Rounds, ...         |
//!  | Ledger: number and tag   | -----> | in program order, of a communicator |
//!  | a TensorPlan per tensor  |        | and of all that were split off it   |
//!  +--------------------------+        +------------------+------------------+
//!                                                         | run, oldest first
//!                                                         v
//!  +- Rounds: one collective -----------------------------------------------+
//!  | for each TensorPlan, for each piece of at most 128 KiB, a Round:       |
//!  |   collect   exchange the peers' contributions (they arrive in Scratch) |
//!  |   settle    reduce them in the order of the pairwise tree              |
//!  |   share     send the reduced piece to the peers                        |
//!  +------------------------------------+-----------------------------------+
//!                                       | Spans; a Pending waits for several
//!                                       v
//!    Channel: the messages of one collective, made by the Transport
//!    (mpi/ or tcp/). Where the ranks share memory, pieces go through the
//!    SharedBuffer, and the Channel carries empty messages as signals.
//! ```
//!
//! `exchange/tensor_plan.rs` decides which pieces of a tensor go where, `exchange/rounds.rs` runs
//! an operation piece by piece, `exchange/queue.rs` keeps operations in order,
//! `exchange/shared_buffer.rs` addresses memory that ranks share, and `exchange/span.rs` holds the
//! raw addresses. A backend implements [`Transport`] (the communicator) and [`Channel`] (the
//! messages of one operation).
//!
//! Bytes are transferred only while a rank waits: neither MPI nor a socket makes progress by
//! itself. So no computation hides communication here, and a progress thread would gain nothing: it
//! would compete with the computation for the same cores (with two ranks on two cores it took half
//! of them). A work that is dropped without a wait is carried out by the next wait.

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

/// This rank in a communicator.
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

/// The messages of one operation. Messages from one rank to another arrive in the order in which
/// they were sent, and are received in that order. Ranks are those of the operation's communicator.
///
/// The caller keeps a span's memory alive until its message has been waited for; until then it
/// neither writes a span that is being sent nor touches one that is being received.
///
/// # Errors
/// [`Error::Desync`] for a message of another operation, [`Error::Peer`] if a peer announced that
/// it failed, [`Error::Collective`] for everything else.
pub trait Channel {
    /// Messages that were started and have not been waited for.
    type Messages: Default;

    /// Starts to send; the span is not empty.
    fn send(&self, messages: &mut Self::Messages, span: Span, peer: usize) -> Result<()>;

    /// Starts to receive; the span is not empty.
    fn receive(&self, messages: &mut Self::Messages, span: Span, peer: usize) -> Result<()>;

    /// Starts to send an empty message. Writes to shared memory before it are visible to the peer
    /// that has received it.
    fn send_signal(&self, messages: &mut Self::Messages, peer: usize) -> Result<()>;

    /// Starts to receive an empty message.
    fn receive_signal(&self, messages: &mut Self::Messages, peer: usize) -> Result<()>;

    /// Blocks until every message has arrived or left.
    fn wait(&self, messages: &mut Self::Messages) -> Result<()>;
}

/// A communicator as its backend represents it.
pub trait Transport: Sized + 'static {
    type Channel: Channel + 'static;

    const BACKEND: &'static str;

    fn membership(&self) -> Membership;

    /// Memory that all its ranks share; `None` if they are not on one machine.
    fn shared_buffer(&self) -> Option<&Rc<SharedBuffer>>;

    /// Returns the channel of the operation that `issued` identifies.
    fn channel(&self, call: Call, issued: Issued) -> Self::Channel;

    /// Blocks until every rank has called it. No operation may be under way.
    fn barrier(&self, call: Call, issued: Issued) -> Result<()>;

    /// Returns the communicator of the ranks with this color. No operation may be under way.
    fn split(whole: &Communicator<Self>, call: Call, color: usize) -> Result<Self>;
}

/// Messages under way that are waited for together, and the copies to make once all have arrived.
pub struct Pending<C: Channel> {
    messages: C::Messages,
    /// Source and destination of each copy.
    copies: Vec<(Span, Span)>,
}

impl<C: Channel> Default for Pending<C> {
    fn default() -> Self {
        Pending { messages: C::Messages::default(), copies: Vec::new() }
    }
}

impl<C: Channel> Pending<C> {
    /// An empty span sends no message.
    fn send(&mut self, channel: &C, span: Span, peer: usize) -> Result<()> {
        if span.elements == 0 { Ok(()) } else { channel.send(&mut self.messages, span, peer) }
    }

    /// An empty span receives no message.
    fn receive(&mut self, channel: &C, span: Span, peer: usize) -> Result<()> {
        if span.elements == 0 { Ok(()) } else { channel.receive(&mut self.messages, span, peer) }
    }

    fn send_signal(&mut self, channel: &C, peer: usize) -> Result<()> {
        channel.send_signal(&mut self.messages, peer)
    }

    fn receive_signal(&mut self, channel: &C, peer: usize) -> Result<()> {
        channel.receive_signal(&mut self.messages, peer)
    }

    /// Copies `from` to `to` once everything has arrived.
    fn then_copy(&mut self, from: Span, to: Span) {
        self.copies.push((from, to));
    }

    fn wait(&mut self, channel: &C) -> Result<()> {
        channel.wait(&mut self.messages)?;
        self.copies.drain(..).for_each(|(from, to)| to.stream_from(from));
        Ok(())
    }
}

/// This process as a rank of a communicator. It stays on its thread, because its queue does.
pub struct Communicator<T: Transport> {
    pub(super) transport: T,
    queue: Rc<RefCell<Queue<T::Channel>>>,
    ledger: Ledger,
    meter: Meter,
}

impl<T: Transport> Communicator<T> {
    /// A communicator with a queue of its own.
    pub(super) fn new(transport: T) -> Self {
        Communicator {
            transport,
            queue: Rc::default(),
            ledger: Ledger::default(),
            meter: Meter::default(),
        }
    }

    fn call(operation: &'static str) -> Call {
        Call { backend: T::BACKEND, operation }
    }

    /// Queues an operation. Waiting for the work carries it out, after the operations issued before
    /// it.
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

    /// Bytes of a piece in transit between these ranks.
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

/// Each tensor's slice and its full tensor, flattened to one list.
fn flat(tensors: Vec<Sliced>) -> Vec<Tensor> {
    tensors.into_iter().flat_map(|sliced| [sliced.owned, sliced.full]).collect()
}

impl<T: Transport> Collective for Communicator<T> {
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
        Ok(self.issue(call, Signature::new("all_reduce", &buffers).reduced_by(op), plans, buffers))
    }

    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        let call = Self::call("reduce_scatter");
        let plans = tensors
            .iter()
            .map(|sliced| self.plan(call, Pattern::Owned(op), sliced))
            .collect::<Result<_>>()?;
        let signature = Signature::new("reduce_scatter", tensors.iter().map(|sliced| &sliced.full))
            .reduced_by(op);
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
        let plans = vec![TensorPlan::whole(
            membership,
            self.piece_bytes(),
            Pattern::Broadcast(root),
            &buffer,
        )];
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
        self.transport.barrier(call, self.ledger.enter(Signature::new("barrier", [])))
    }

    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        let call = Self::call("split");
        self.queue.borrow_mut().drain(call)?;
        self.ledger.enter(Signature::new("split", []));
        let transport = T::split(self, call, color)?;
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

/// The error of two ranks at different operations; `theirs` and `ours` name the operations.
pub fn disagreement(peer: usize, theirs: &str, rank: usize, ours: &str) -> Error {
    let what = match theirs == ours {
        true => format!(
            "ranks disagree: rank {peer} is at {theirs} like rank {rank}, but came there by other operations"
        ),
        false => format!("ranks disagree: rank {peer} is at {theirs}, rank {rank} at {ours}"),
    };
    Error::Desync { what }
}
