//! What one communicator has under way: issued on the side stream, watched by events, timed when it
//! is over.
//!
//! A GPU waits for a dead peer in silence, and the host must not wait with it. So each operation
//! leaves a mark behind itself and every later call looks at the marks: at one that the device has
//! passed, for the time it took; at one that it should have passed long ago; and at what NCCL has
//! noticed meanwhile. Between two calls nothing is noticed: a rank that blocks in libtorch for a
//! number off the device sits there until somebody else ends the process.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::mem::forget;
use std::rc::Rc;
use std::time::Instant;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclResult_t};
use tch::Tensor;

use super::comm::{NcclComm, poll};
use super::{Call, Limits, Transfer};
use crate::collective::{Meter, Spent, Work};
use crate::cuda::Outcome;
use crate::cuda::driver::{Device, Event, Stream};
use crate::error::{Error, Result};

/// A GPU and the stream on which collectives run there. Communicators of one process share it: two
/// that run at once on one GPU could each wait for the other on different ranks.
pub(super) struct Side {
    stream: Stream,
    device: Rc<Device>,
}

/// One communicator's traffic. Its fields are given back in this order.
pub(super) struct Traffic {
    communicator: NcclComm,
    under_way: RefCell<VecDeque<Issue>>,
    /// Marks in the compute stream before and after it waited.
    stalls: RefCell<VecDeque<(Event, Event)>>,
    side: Rc<Side>,
    limits: Limits,
    /// `rank 1/4`, for messages.
    place: String,
    /// How many operations were issued.
    count: Cell<u64>,
    /// What went wrong first; nothing is issued afterwards.
    failure: RefCell<Option<String>>,
    meter: Meter,
    /// Whether tensors lie in the host's memory, where libtorch reads without asking a stream.
    is_on_host: bool,
}

/// An operation in the side stream.
struct Issue {
    /// As a message names it.
    name: String,
    issued: Instant,
    began: Event,
    ended: Rc<Event>,
}

impl Side {
    /// Of the GPU with this number.
    pub fn open(ordinal: usize) -> Outcome<Self> {
        let device = Rc::new(Device::open(ordinal)?);
        tracing::debug!("GPU {ordinal} is {}", device.name()?);
        Ok(Side { stream: Stream::beside(&device)?, device })
    }
}

impl Traffic {
    pub fn new(
        communicator: NcclComm,
        side: Rc<Side>,
        limits: Limits,
        place: String,
        is_on_host: bool,
    ) -> Self {
        let (under_way, stalls, failure) = Default::default();
        Traffic {
            communicator,
            under_way,
            stalls,
            side,
            limits,
            place,
            count: Cell::new(0),
            failure,
            meter: Meter::default(),
            is_on_host,
        }
    }

    /// Issues transfers between tensors as one operation, behind what the compute stream has been
    /// given so far. The work owns the tensors.
    pub fn issue(
        self: &Rc<Self>,
        call: Call,
        tensors: Vec<Tensor>,
        transfers: Vec<Transfer>,
        start: impl Fn(&Transfer, ncclComm_t, cudaStream_t) -> ncclResult_t,
    ) -> Result<Work> {
        self.look(call)?;
        let transfers: Vec<Transfer> =
            transfers.into_iter().filter(|transfer| transfer.count > 0).collect();
        if transfers.is_empty() {
            return Ok(Work::done());
        }
        let bytes: usize = transfers.iter().map(|transfer| transfer.bytes).sum();
        let number = self.count.replace(self.count.get() + 1);
        let name = format!("{} of {bytes} bytes (operation {number} of its world)", call.operation);
        let marks = self.enqueue(&transfers, start);
        let pending =
            Pending { call, name: name.clone(), tensors, traffic: self.clone(), is_over: false };
        let (began, ended) = marks.map_err(|what| self.fail(call, format!("{name}: {what}")))?;
        let ended = Rc::new(ended);
        self.under_way.borrow_mut().push_back(Issue {
            name,
            issued: Instant::now(),
            began,
            ended: ended.clone(),
        });
        Ok(Work::new(move || pending.wait(&ended)))
    }

    /// The marks where data begin to travel and where they have arrived.
    fn enqueue(
        &self,
        transfers: &[Transfer],
        start: impl Fn(&Transfer, ncclComm_t, cudaStream_t) -> ncclResult_t,
    ) -> Outcome<(Event, Event)> {
        let stream = &self.side.stream;
        stream.wait(&Stream::COMPUTE.mark()?)?;
        let began = stream.mark()?;
        self.communicator.group(stream.raw().cast(), transfers, start)?;
        self.communicator.settle(self.limits.operation)?;
        Ok((began, stream.mark()?))
    }

    /// Notices what went wrong since the last call, and makes the device current: each operation
    /// and each wait begins here.
    ///
    /// # Errors
    /// [`Error::Collective`] for an error that NCCL reports, an operation beyond its limit, and
    /// after any error before.
    pub fn look(&self, call: Call) -> Result<()> {
        if let Some(first) = &*self.failure.borrow() {
            return Err(call.error(format!(
                "{}: the communicator was given up after an earlier error: {first}",
                self.place
            )));
        }
        let looked = self
            .side
            .device
            .make_current()
            .and_then(|()| self.communicator.is_settled())
            .and_then(|_| self.harvest());
        let looked = looked.map_err(|what| format!("{what}{}", self.oldest()));
        looked.and_then(|()| self.check_limit()).map_err(|what| self.fail(call, what))
    }

    /// Takes the times of what is over.
    fn harvest(&self) -> Outcome<()> {
        let (mut under_way, mut stalls) = (self.under_way.borrow_mut(), self.stalls.borrow_mut());
        let mut spent = Spent::default();
        while let Some(first) = under_way.front()
            && first.ended.is_past()?
        {
            spent.communication_seconds += first.ended.elapsed_since(&first.began)?.as_secs_f64();
            under_way.pop_front();
        }
        while let Some((before, after)) = stalls.front()
            && after.is_past()?
        {
            spent.exposed_seconds += after.elapsed_since(before)?.as_secs_f64();
            stalls.pop_front();
        }
        self.meter.add(spent);
        Ok(())
    }

    /// What is under way ends in the order of its issue, so that the first tells of all.
    fn check_limit(&self) -> Outcome<()> {
        let under_way = self.under_way.borrow();
        let late = under_way.front().filter(|first| first.issued.elapsed() > self.limits.operation);
        late.map_or(Ok(()), |late| Err(late.overdue()))
    }

    /// What an error may have hit, for its message.
    fn oldest(&self) -> String {
        let under_way = self.under_way.borrow();
        under_way
            .front()
            .map(|first| {
                format!(
                    "; under way for {:.1} s: {}",
                    first.issued.elapsed().as_secs_f64(),
                    first.name
                )
            })
            .unwrap_or_default()
    }

    /// Polls until an operation is over: only where tensors lie in the host's memory.
    fn poll_until_past(&self, ended: &Event) -> Outcome<()> {
        let began = Instant::now();
        let is_past = || {
            self.communicator.is_settled()?;
            ended.is_past()
        };
        if !poll(self.limits.operation, is_past)? {
            return Err(self.under_way.borrow().front().map(Issue::overdue).unwrap_or_default());
        }
        self.meter.add(Spent {
            communication_seconds: 0.0,
            exposed_seconds: began.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// Orders the compute stream behind an operation.
    fn stall(&self, ended: &Event) -> Outcome<()> {
        let before = Stream::COMPUTE.mark()?;
        Stream::COMPUTE.wait(ended)?;
        self.stalls.borrow_mut().push_back((before, Stream::COMPUTE.mark()?));
        Ok(())
    }

    /// Gives the communicator up: after an error NCCL promises nothing for what is under way.
    fn fail(&self, call: Call, what: String) -> Error {
        let error = call.error(format!("{}: {what}", self.place));
        *self.failure.borrow_mut() = Some(what);
        // A GPU that hangs may still come to these marks and this stream.
        forget((self.under_way.take(), self.stalls.take(), self.side.clone()));
        self.communicator.abort();
        error
    }

    /// What the operations that are over took. An error shows at the next operation.
    pub fn spent(&self) -> Spent {
        if self.failure.borrow().is_none() {
            let _ = self.harvest();
        }
        self.meter.take()
    }
}

impl Issue {
    fn overdue(&self) -> String {
        format!(
            "{} is not over after {:.1} s: a peer is dead, or in another operation",
            self.name,
            self.issued.elapsed().as_secs_f64()
        )
    }
}

/// An operation that is to be waited for, and the tensors that NCCL reads and writes for it.
struct Pending {
    call: Call,
    name: String,
    tensors: Vec<Tensor>,
    traffic: Rc<Traffic>,
    /// Whether the tensors may be given back.
    is_over: bool,
}

impl Pending {
    /// Returns once the compute stream is ordered behind the operation. Then the tensors' memory
    /// may be used anew: libtorch gives it to what the compute stream does later.
    fn wait(mut self, ended: &Event) -> Result<()> {
        let traffic = self.traffic.clone();
        traffic.look(self.call)?;
        let arrived = if traffic.is_on_host { traffic.poll_until_past(ended) } else { Ok(()) };
        arrived
            .and_then(|()| traffic.stall(ended))
            .map_err(|what| traffic.fail(self.call, format!("{}: {what}", self.name)))?;
        self.is_over = true;
        Ok(())
    }
}

impl Drop for Pending {
    /// On an error path NCCL may still write to the tensors: their memory is never given back.
    fn drop(&mut self) {
        if !self.is_over {
            forget(std::mem::take(&mut self.tensors));
        }
    }
}
