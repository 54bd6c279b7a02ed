//! All that this process has made: streams with their recorded work, events that mark places in it,
//! communicators.
//!
//! Nothing runs by itself. Work advances when the program looks: a query advances what can be, a
//! wait of the compute stream blocks until it is done, because a CPU's "compute stream" is the
//! program itself.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::board::Board;
use crate::clock;
use crate::copy::Copy;
use crate::failure::fail;
use crate::module::{Function, Module};
use crate::operation::{Call, Operation};
use crate::switches::switches;
use crate::table::Table;

/// A place in a stream's work.
pub struct Mark {
    /// 0 for the compute stream.
    pub stream: usize,
    /// Items that the stream had been given.
    pub position: u64,
    pub recorded_at: u64,
    /// When the stream came by; 0: not yet.
    pub passed_at: AtomicU64,
    /// Number of the record on the compute stream.
    pub compute_record: u64,
}

impl Mark {
    pub fn passed(&self) -> Option<u64> {
        Some(self.passed_at.load(Ordering::Relaxed)).filter(|time| *time != 0)
    }
}

pub enum Item {
    Operation(Box<Operation>),
    Copy(Copy),
    Wait(Arc<Mark>),
    Record(Arc<Mark>),
}

#[derive(Default)]
pub struct Stream {
    queue: VecDeque<Item>,
    given: u64,
    done: u64,
    /// Time at which the work done so far was done.
    time: u64,
    /// Record of the compute stream that it last waited for, and whether no launch has come since.
    waited_for: u64,
    fresh: bool,
    /// Operations that the compute stream has not waited for, by position, with their communicator.
    unobserved: BTreeMap<u64, (usize, String)>,
    /// Waits for other side streams, with the position of the wait.
    waits: Vec<(u64, Arc<Mark>)>,
    /// Communicators of the last launch.
    launched: Vec<usize>,
}

pub struct Event {
    pub timed: bool,
    pub mark: Option<Arc<Mark>>,
}

/// What a communicator is doing on this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Joining,
    Ready,
    /// An operation was launched; so many polls still answer that it is in progress.
    Launching {
        polls: u32,
    },
    Stuck,
    Finalizing,
    Finalized,
    /// NCCL's number of an error.
    Broken(u32),
}

pub struct Communicator {
    /// Absent on a rank that a switch keeps from joining.
    pub board: Option<Board>,
    pub rank: usize,
    pub num_ranks: usize,
    pub hash: u64,
    pub phase: Phase,
    /// Error that polls report once the launch under way has succeeded.
    pub late_error: Option<u32>,
    next: u64,
    /// Operations not done yet.
    pending: u64,
    pruned: u64,
}

impl Communicator {
    pub fn new(
        board: Option<Board>,
        rank: usize,
        num_ranks: usize,
        hash: u64,
        phase: Phase,
    ) -> Self {
        Communicator {
            board,
            rank,
            num_ranks,
            hash,
            phase,
            late_error: None,
            next: 0,
            pending: 0,
            pruned: 0,
        }
    }
}

/// The calling thread, as groups belong to threads.
pub fn thread() -> i32 {
    // SAFETY: it only answers.
    unsafe { libc::gettid() }
}

/// Calls between a group's start and its end, on one thread.
#[derive(Default)]
pub struct Group {
    pub depth: usize,
    pub calls: Vec<Call>,
}

pub struct World {
    pub streams: Table<Stream>,
    pub events: Table<Event>,
    pub communicators: Table<Communicator>,
    /// With the device that each was loaded for.
    pub modules: Table<(usize, Module)>,
    pub functions: Table<Function>,
    /// Memory of the host that was allocated for copies, by its start.
    pub pinned: BTreeMap<usize, usize>,
    pub groups: BTreeMap<i32, Group>,
    /// Events recorded on the compute stream so far.
    pub compute_records: u64,
    /// Operations started on each communicator that ever was, by the hash of its id.
    pub started: Vec<(u64, u64)>,
    /// Operations started in all.
    pub operations: u64,
}

static WORLD: Mutex<World> = Mutex::new(World {
    streams: Table::new("stream", 0x51),
    events: Table::new("event", 0xe7),
    communicators: Table::new("communicator", 0xc0),
    modules: Table::new("module", 0x30),
    functions: Table::new("function", 0xf0),
    pinned: BTreeMap::new(),
    groups: BTreeMap::new(),
    compute_records: 0,
    started: Vec::new(),
    operations: 0,
});

pub fn world() -> MutexGuard<'static, World> {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// At the process's end: another thread may hold it for ever.
pub fn try_world() -> Option<MutexGuard<'static, World>> {
    WORLD.try_lock().ok()
}

impl World {
    /// The events of `stream` must not be touched while a launch on it is in progress, nor inside
    /// of a group that uses it.
    pub fn check_settled(&mut self, stream: usize, function: &str) {
        let title = self.streams.title(stream);
        if self.groups.values().any(|group| group.calls.iter().any(|call| call.stream == stream)) {
            fail(format!("{function}: a group with calls on {title} is still open"));
        }
        for communicator in std::mem::take(&mut self.streams.get(stream, function).launched) {
            if let Some(Phase::Launching { .. } | Phase::Stuck) =
                self.communicators.find(communicator).map(|found| found.phase)
            {
                let name = self.communicators.title(communicator);
                fail(format!(
                    "{function}: the last launch on {title} is in progress; poll {name} until it is not"
                ));
            }
        }
    }

    /// A mark at the end of what the stream has been given.
    pub fn mark(&mut self, stream: usize, function: &str) -> Arc<Mark> {
        let now = clock::now();
        if stream == 0 {
            self.compute_records += 1;
            let compute_record = self.compute_records;
            return Arc::new(Mark {
                stream,
                position: 0,
                recorded_at: now,
                passed_at: AtomicU64::new(now),
                compute_record,
            });
        }
        let stream_of = self.streams.get(stream, function);
        let position = stream_of.given;
        let mark = Arc::new(Mark {
            stream,
            position,
            recorded_at: now,
            passed_at: AtomicU64::new(0),
            compute_record: 0,
        });
        stream_of.give(Item::Record(mark.clone()));
        mark
    }

    /// Orders a side stream's further work after a mark.
    pub fn wait(&mut self, stream: usize, mark: Arc<Mark>, function: &str) {
        let stream = self.streams.get(stream, function);
        if mark.stream == 0 {
            stream.fresh |= mark.compute_record > stream.waited_for;
            stream.waited_for = stream.waited_for.max(mark.compute_record);
        } else {
            stream.waits.push((stream.given, mark.clone()));
        }
        stream.give(Item::Wait(mark));
    }

    /// Starts a group of calls.
    pub fn launch(&mut self, calls: Vec<Call>) {
        let number = calls.len();
        for (place, call) in calls.iter().enumerate() {
            self.start(*call, (place, number));
        }
        for call in &calls {
            let stream = self.streams.get(call.stream, call.name());
            stream.fresh = false;
            if !stream.launched.contains(&call.communicator) {
                stream.launched.push(call.communicator);
            }
        }
    }

    fn start(&mut self, call: Call, group: (usize, usize)) {
        let order = self.started.clone();
        let here = crate::failure::rank()
            .map(|rank| crate::switches::Place { rank, operation: self.operations });
        self.operations += 1;
        let communicator = self.communicators.get(call.communicator, call.name());
        let (number, hash) = (communicator.next, communicator.hash);
        let Some(board) = &communicator.board else {
            fail(format!("{}: the communicator never came to be", call.name()))
        };
        let mut operation =
            Operation::new(call, number, board, group, order, extra_delay(call.stream, number));
        for (_, stream) in self.streams.iter() {
            for item in &stream.queue {
                if let Item::Operation(other) = item
                    && other.collides_with(&operation)
                {
                    fail(format!(
                        "{} uses memory that {} still uses",
                        operation.describe(),
                        other.describe()
                    ));
                }
            }
        }
        communicator.next += 1;
        communicator.pending += 1;
        // In a group an earlier call may have hit a switch already.
        if !matches!(communicator.phase, Phase::Stuck | Phase::Broken(_)) {
            communicator.phase = Phase::Launching { polls: 1 };
        }
        let asked = |place: Option<crate::switches::Place>| place.is_some() && place == here;
        if asked(switches().stuck_operation) {
            communicator.phase = Phase::Stuck;
        } else if asked(switches().launch_error) {
            communicator.phase = Phase::Broken(crate::nccl::SYSTEM_ERROR);
        } else if asked(switches().late_error) {
            communicator.late_error = Some(crate::nccl::REMOTE_ERROR);
        } else if asked(switches().device_error) {
            crate::device::break_down();
        }
        operation.stuck = communicator.late_error.is_some()
            || crate::device::failed().is_some()
            || matches!(communicator.phase, Phase::Stuck | Phase::Broken(_));
        if !operation.stuck {
            operation.post(board);
        }
        if let Some(started) = self.started.iter_mut().find(|(id, _)| *id == hash) {
            started.1 += 1;
        }
        let stream = self.streams.get(call.stream, call.name());
        stream.unobserved.insert(stream.given, (call.communicator, operation.describe()));
        stream.give(Item::Operation(Box::new(operation)));
    }

    /// Starts a copy from the host on a side stream.
    pub fn copy(&mut self, stream: usize, copy: Copy) {
        let own = self.streams.get(stream, Copy::NAME);
        own.fresh = false;
        own.unobserved.insert(own.given, (0, copy.describe()));
        own.give(Item::Copy(copy));
    }

    /// Whether a launch on the stream comes after an event of the compute stream that no earlier
    /// launch has used up.
    pub fn is_fresh(&mut self, stream: usize, function: &str) -> bool {
        self.streams.get(stream, function).fresh
    }

    /// Does what can be done of a stream's work up to a position.
    pub fn advance(&mut self, stream: usize, position: u64) {
        let Some(mut own) = self.streams.find(stream).map(std::mem::take) else { return };
        while own.done <= position {
            let Some(mut item) = own.queue.pop_front() else { break };
            let Some(time) = self.step(&mut item, own.time) else {
                own.queue.push_front(item);
                break;
            };
            own.time = own.time.max(time);
            own.done += 1;
        }
        self.streams.put_back(stream, own);
    }

    /// The time at which an item is done, if it can be now.
    fn step(&mut self, item: &mut Item, started: u64) -> Option<u64> {
        match item {
            Item::Record(mark) => {
                let time = started.max(mark.recorded_at);
                mark.passed_at.store(time, Ordering::Relaxed);
                Some(time)
            }
            Item::Wait(mark) => {
                if mark.passed().is_none() {
                    self.advance(mark.stream, mark.position);
                }
                mark.passed()
            }
            Item::Operation(operation) => self.run(operation, started),
            Item::Copy(copy) => {
                copy.finish();
                Some(started.max(copy.launched_at))
            }
        }
    }

    fn run(&mut self, operation: &mut Operation, started: u64) -> Option<u64> {
        // The operations of an aborted communicator are nobody's any more.
        let Some(communicator) = self.communicators.find(operation.call.communicator) else {
            return Some(started);
        };
        let board = communicator.board.as_ref()?;
        let arrival = operation.arrival(board, started)?;
        if clock::now() < arrival {
            return None;
        }
        operation.finish(board);
        communicator.pending -= 1;
        communicator.pruned = board.prune(communicator.pruned);
        Some(arrival)
    }

    /// Advances every stream as far as it goes; tells whether a communicator has no operation under
    /// way then.
    pub fn is_idle(&mut self, communicator: usize) -> bool {
        let streams: Vec<usize> = self.streams.iter().map(|(handle, _)| handle).collect();
        streams.into_iter().for_each(|stream| self.advance(stream, u64::MAX));
        self.communicators.find(communicator).is_none_or(|found| found.pending == 0)
    }

    /// The compute stream has waited for a mark: what lies before it may be read.
    pub fn observe(&mut self, mark: &Mark) {
        let Some(stream) = self.streams.find(mark.stream) else { return };
        stream.unobserved = stream.unobserved.split_off(&mark.position);
        let seen: Vec<_> = stream
            .waits
            .extract_if(.., |(position, _)| *position < mark.position)
            .map(|(_, mark)| mark)
            .collect();
        seen.iter().for_each(|mark| self.observe(mark));
    }

    /// The operation at the head of a stream, for which the host waits.
    pub fn awaited(&self, stream: usize) -> Option<&Operation> {
        match self.streams.peek(stream)?.queue.front()? {
            Item::Operation(operation) => Some(operation),
            Item::Wait(mark) => self.awaited(mark.stream),
            Item::Record(_) | Item::Copy(_) => None,
        }
    }

    /// The operations of an aborted communicator: nobody waits for them any more.
    pub fn forget(&mut self, communicator: usize) {
        let handles: Vec<usize> = self.streams.iter().map(|(handle, _)| handle).collect();
        for handle in handles {
            if let Some(stream) = self.streams.find(handle) {
                stream.unobserved.retain(|_, (owner, _)| *owner != communicator);
            }
        }
    }

    /// The first operation of any stream, or of one, that the compute stream never waited for.
    pub fn unobserved(&self, only: Option<usize>) -> Option<String> {
        self.streams.iter().filter(|(handle, _)| only.is_none_or(|only| only == *handle)).find_map(
            |(handle, stream)| {
                let (_, operation) = stream.unobserved.values().next()?;
                Some(format!(
                    "{operation} on {} was never waited for by the compute stream",
                    self.streams.title(handle)
                ))
            },
        )
    }
}

impl Stream {
    fn give(&mut self, item: Item) {
        self.queue.push_back(item);
        self.given += 1;
    }

    pub fn has_work(&self) -> bool {
        self.queue.iter().any(|item| matches!(item, Item::Operation(_) | Item::Copy(_)))
    }

    pub fn is_done(&self) -> bool {
        self.queue.is_empty()
    }
}

/// With the shuffle, up to 10 ms or twice the delay: streams finish in another order at every seed.
fn extra_delay(stream: usize, number: u64) -> u64 {
    let Some(seed) = switches().shuffle else { return 0 };
    let most = (2 * switches().delay).max(Duration::from_millis(10)).as_nanos() as u64;
    // The finalizer of SplitMix64.
    let mut mixed =
        seed ^ (stream as u64).rotate_left(32) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) % most
}
