//! The operations of one communicator: issued on the side stream, watched through events, and timed
//! when they are complete.
//!
//! A GPU waits for a dead peer without an error, and the host must not wait with it. So each
//! operation records an event behind itself, and every later call checks: the events that have
//! completed, for the time that the operation took; the oldest one, for the time limit; and NCCL,
//! for asynchronous errors. Nothing is noticed between two calls: a rank that blocks in libtorch,
//! to read a number from the device, hangs until another process or thread ends it.

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

/// A GPU, and the stream on which its collectives run. All communicators of a process share it: two
/// collectives that run at once on one GPU could each wait for the other on different ranks.
pub(super) struct SideStream {
    stream: Stream,
    device: Rc<Device>,
}

/// The operations of one communicator. The order of the fields is the order in which they are
/// dropped.
pub(super) struct Traffic {
    communicator: NcclComm,
    under_way: RefCell<VecDeque<Enqueued>>,
    /// Events recorded in the compute stream before and after each wait.
    stalls: RefCell<VecDeque<(Event, Event)>>,
    side: Rc<SideStream>,
    limits: Limits,
    /// `rank 1/4`, for messages.
    label: String,
    /// Number of operations issued.
    count: Cell<u64>,
    /// The first error; nothing is issued after it.
    failure: RefCell<Option<String>>,
    meter: Meter,
    /// True if the tensors are in host memory, which libtorch reads without regard to a stream.
    is_on_host: bool,
}

/// An operation in the side stream.
struct Enqueued {
    /// Its name in messages.
    name: String,
    issued: Instant,
    began: Event,
    ended: Rc<Event>,
}

impl SideStream {
    /// Opens the GPU with this index.
    pub fn open(ordinal: usize) -> Outcome<Self> {
        let device = Rc::new(Device::open(ordinal)?);
        tracing::debug!("GPU {ordinal} is {}", device.name()?);
        Ok(SideStream { stream: Stream::new(&device)?, device })
    }
}

impl Traffic {
    pub fn new(
        communicator: NcclComm,
        side: Rc<SideStream>,
        limits: Limits,
        label: String,
        is_on_host: bool,
    ) -> Self {
        let (under_way, stalls, failure) = Default::default();
        Traffic {
            communicator,
            under_way,
            stalls,
            side,
            limits,
            label,
            count: Cell::new(0),
            failure,
            meter: Meter::default(),
            is_on_host,
        }
    }

    /// Issues transfers between tensors as one operation, after all work that the compute stream
    /// has been given so far. The returned work owns the tensors.
    pub fn issue(
        self: &Rc<Self>,
        call: Call,
        tensors: Vec<Tensor>,
        transfers: Vec<Transfer>,
        start: impl Fn(&Transfer, ncclComm_t, cudaStream_t) -> ncclResult_t,
    ) -> Result<Work> {
        self.check_health(call)?;
        let transfers: Vec<Transfer> =
            transfers.into_iter().filter(|transfer| transfer.count > 0).collect();
        if transfers.is_empty() {
            return Ok(Work::done());
        }
        let bytes: usize = transfers.iter().map(|transfer| transfer.bytes).sum();
        let number = self.count.replace(self.count.get() + 1);
        let name = format!("{} of {bytes} bytes (operation {number} of its world)", call.operation);
        let events = self.enqueue(&transfers, start);
        let unwaited =
            Unwaited { call, name: name.clone(), tensors, traffic: self.clone(), is_over: false };
        let (began, ended) = events.map_err(|what| self.fail(call, format!("{name}: {what}")))?;
        let ended = Rc::new(ended);
        self.under_way.borrow_mut().push_back(Enqueued {
            name,
            issued: Instant::now(),
            began,
            ended: ended.clone(),
        });
        Ok(Work::new(move || unwaited.wait(&ended)))
    }

    /// Queues the transfers. Returns the events recorded before and after them.
    fn enqueue(
        &self,
        transfers: &[Transfer],
        start: impl Fn(&Transfer, ncclComm_t, cudaStream_t) -> ncclResult_t,
    ) -> Outcome<(Event, Event)> {
        let stream = &self.side.stream;
        stream.wait(&Stream::COMPUTE.record()?)?;
        let began = stream.record()?;
        self.communicator.group(stream.raw().cast(), transfers, start)?;
        self.communicator.wait_until_accepted(self.limits.operation)?;
        Ok((began, stream.record()?))
    }

    /// Checks for errors since the last call and makes the device current. Each operation and each
    /// wait starts with it.
    ///
    /// # Errors
    /// [`Error::Collective`] for an error that NCCL reports, for an operation beyond its time
    /// limit, and after any earlier error; [`Error::Device`] if the device has failed.
    pub fn check_health(&self, call: Call) -> Result<()> {
        if let Some(first) = &*self.failure.borrow() {
            return Err(call.error(format!(
                "{}: the communicator was given up after an earlier error: {first}",
                self.label
            )));
        }
        let outcome = self
            .side
            .device
            .make_current()
            .and_then(|()| self.communicator.has_accepted())
            .and_then(|_| self.harvest());
        let outcome = outcome.map_err(|what| format!("{what}{}", self.oldest()));
        outcome.and_then(|()| self.check_limit()).map_err(|what| self.fail(call, what))
    }

    /// Adds the times of completed operations and waits to the meter.
    fn harvest(&self) -> Outcome<()> {
        let (mut under_way, mut stalls) = (self.under_way.borrow_mut(), self.stalls.borrow_mut());
        let mut spent = Spent::default();
        while let Some(first) = under_way.front()
            && first.ended.is_complete()?
        {
            spent.communication_seconds += first.ended.elapsed_since(&first.began)?.as_secs_f64();
            under_way.pop_front();
        }
        while let Some((before, after)) = stalls.front()
            && after.is_complete()?
        {
            spent.exposed_seconds += after.elapsed_since(before)?.as_secs_f64();
            stalls.pop_front();
        }
        self.meter.add(spent);
        Ok(())
    }

    /// Checks the oldest operation against the time limit: operations complete in the order of
    /// their issue.
    fn check_limit(&self) -> Outcome<()> {
        let under_way = self.under_way.borrow();
        let late = under_way.front().filter(|first| first.issued.elapsed() > self.limits.operation);
        late.map_or(Ok(()), |late| Err(late.overdue()))
    }

    /// Names the operation that an error may have hit, for its message.
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

    /// Polls until an operation is complete: only for tensors in host memory.
    fn poll_until_complete(&self, ended: &Event) -> Outcome<()> {
        let began = Instant::now();
        let is_complete = || {
            self.communicator.has_accepted()?;
            ended.is_complete()
        };
        if !poll(self.limits.operation, is_complete)? {
            return Err(self.under_way.borrow().front().map(Enqueued::overdue).unwrap_or_default());
        }
        self.meter.add(Spent {
            communication_seconds: 0.0,
            exposed_seconds: began.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// Makes the compute stream wait for an operation.
    fn stall(&self, ended: &Event) -> Outcome<()> {
        let before = Stream::COMPUTE.record()?;
        Stream::COMPUTE.wait(ended)?;
        self.stalls.borrow_mut().push_back((before, Stream::COMPUTE.record()?));
        Ok(())
    }

    /// Aborts the communicator: after an error NCCL gives no guarantee for the operations under
    /// way. A kernel that failed earlier is noticed here too, and is an error of the device.
    fn fail(&self, call: Call, what: String) -> Error {
        let text = format!("{}: {what}", self.label);
        let error = Error::from_library_or(text, |text| call.error(text));
        *self.failure.borrow_mut() = Some(what);
        // Leaked, because a GPU that hangs may still reach these events and this stream.
        forget((self.under_way.take(), self.stalls.take(), self.side.clone()));
        self.communicator.abort();
        error
    }

    /// Returns the time that completed operations took. An error is left for the next operation to
    /// report.
    pub fn spent(&self) -> Spent {
        if self.failure.borrow().is_none() {
            let _ = self.harvest();
        }
        self.meter.take()
    }
}

impl Enqueued {
    fn overdue(&self) -> String {
        format!(
            "{} is not over after {:.1} s: a peer is dead, or in another operation",
            self.name,
            self.issued.elapsed().as_secs_f64()
        )
    }
}

/// An operation that has not been waited for, and the tensors that NCCL reads and writes for it.
struct Unwaited {
    call: Call,
    name: String,
    tensors: Vec<Tensor>,
    traffic: Rc<Traffic>,
    /// True if the tensors may be freed.
    is_over: bool,
}

impl Unwaited {
    /// Makes the compute stream wait for the operation, then frees the tensors: libtorch reuses
    /// their memory only for later work of the compute stream.
    fn wait(mut self, ended: &Event) -> Result<()> {
        let traffic = self.traffic.clone();
        traffic.check_health(self.call)?;
        let arrived = if traffic.is_on_host { traffic.poll_until_complete(ended) } else { Ok(()) };
        arrived
            .and_then(|()| traffic.stall(ended))
            .map_err(|what| traffic.fail(self.call, format!("{}: {what}", self.name)))?;
        self.is_over = true;
        Ok(())
    }
}

impl Drop for Unwaited {
    /// Leaks the tensors after an error, because NCCL may still write to them.
    fn drop(&mut self) {
        if !self.is_over {
            forget(std::mem::take(&mut self.tensors));
        }
    }
}
