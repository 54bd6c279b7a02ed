//! NCCL's functions, of version 2.29.7. Longer than most files, because each must be here with its
//! whole C signature.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use crate::board::{self, Board};
use crate::cuda;
use crate::element::{Element, Reduction};
use crate::failure::{fail, set_rank};
use crate::operation::{Call, Collective};
use crate::switches::switches;
use crate::world::{Communicator, Phase, World, thread, world};

pub type NcclResult = u32;

const SUCCESS: NcclResult = 0;
pub const SYSTEM_ERROR: NcclResult = 2;
const INVALID_ARGUMENT: NcclResult = 4;
const INVALID_USAGE: NcclResult = 5;
pub const REMOTE_ERROR: NcclResult = 6;
const IN_PROGRESS: NcclResult = 7;

/// 2.29.7 as NCCL counts.
const VERSION: c_int = 22_907;
const ID_BYTES: usize = 128;
const MAGIC: c_uint = 0xcafe_beef;
/// NCCL's default of every number of its configuration.
const UNDEFINED: c_int = c_int::MIN;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; ID_BYTES]);

/// The beginning of NCCL's configuration, which all its versions share.
#[repr(C)]
pub struct Config {
    pub size: usize,
    pub magic: c_uint,
    pub version: c_uint,
    pub blocking: c_int,
    pub cga_cluster_size: c_int,
    pub min_ctas: c_int,
    pub max_ctas: c_int,
    pub net_name: *const c_char,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> NcclResult {
    unsafe { version.write(VERSION) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> NcclResult {
    let folder = board::new_folder();
    let text = folder.to_string_lossy();
    let mut bytes = [0; ID_BYTES];
    if text.len() >= ID_BYTES {
        fail(format!("{text} is too long a path for a unique id"));
    }
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    unsafe { id.write(UniqueId(bytes)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(result: NcclResult) -> *const c_char {
    error_string(result).as_ptr()
}

fn error_string(result: NcclResult) -> &'static CStr {
    match result {
        SUCCESS => c"no error",
        1 => c"unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        SYSTEM_ERROR => c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
        3 => c"internal error - please report this issue to the NCCL developers",
        INVALID_ARGUMENT => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        INVALID_USAGE => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unknown result code",
    }
}

thread_local! {
    /// What the last pointer of [`ncclGetLastError`] points to.
    static LAST_ERROR: RefCell<CString> = RefCell::new(CString::default());
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(communicator: *mut c_void) -> *const c_char {
    let mut world = world();
    // NCCL takes null for the process's last error.
    let phase = (!communicator.is_null())
        .then(|| world.communicators.get(communicator as usize, "ncclGetLastError").phase);
    let text = match phase {
        Some(Phase::Broken(INVALID_USAGE)) => {
            "Duplicate GPU detected: two ranks of the communicator have the same device"
        }
        Some(Phase::Broken(_)) => "the double reports the error that a switch asks for",
        _ => "",
    };
    LAST_ERROR.with(|last| {
        last.replace(CString::new(text).unwrap_or_default());
        last.borrow().as_ptr()
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    communicator: *mut *mut c_void,
    num_ranks: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut Config,
) -> NcclResult {
    const NAME: &str = "ncclCommInitRankConfig";
    crate::leaks::watch();
    let config = unsafe { config.as_ref() };
    check_config(config.unwrap_or_else(|| {
        fail(format!("{NAME}: without a configuration the communicator blocks the host"))
    }));
    let (Ok(rank), Ok(num_ranks)) = (usize::try_from(rank), usize::try_from(num_ranks)) else {
        return INVALID_ARGUMENT;
    };
    if rank >= num_ranks || num_ranks > board::MOST_RANKS {
        return INVALID_ARGUMENT;
    }
    let Some(device) = cuda::current_device() else {
        fail(format!("{NAME}: this thread has no current context, so no GPU is meant"))
    };
    set_rank(rank);
    let mut hasher = DefaultHasher::new();
    id.0.hash(&mut hasher);
    let hash = hasher.finish();
    let stuck = switches().stuck_init == crate::failure::rank();
    let board = (!stuck)
        .then(|| Board::join(folder_of(&id), rank, num_ranks, cuda::identity(device) as u32));
    let phase = if stuck { Phase::Stuck } else { Phase::Joining };
    let mut world = world();
    world.started.push((hash, 0));
    let handle = world.communicators.add(Communicator::new(board, rank, num_ranks, hash, phase));
    unsafe { communicator.write(handle as *mut c_void) };
    IN_PROGRESS
}

fn check_config(config: &Config) {
    const NAME: &str = "ncclCommInitRankConfig";
    if config.magic != MAGIC || config.size < size_of::<Config>() || config.size > 256 {
        fail(format!(
            "{NAME}: the configuration was not initialized: size {}, magic {:#x}",
            config.size, config.magic
        ));
    }
    if config.version != VERSION as c_uint {
        fail(format!(
            "{NAME}: the configuration is one of version {}, the library {VERSION}",
            config.version
        ));
    }
    if config.blocking != 0 {
        fail(format!(
            "{NAME}: with blocking = {} the communicator blocks the host, 0 is expected",
            config.blocking
        ));
    }
    let positive = [("minCTAs", config.min_ctas), ("maxCTAs", config.max_ctas)];
    if let Some((name, value)) =
        positive.iter().find(|(_, value)| *value != UNDEFINED && *value <= 0)
    {
        fail(format!("{NAME}: {name} = {value} is neither positive nor undefined"));
    }
    if config.cga_cluster_size != UNDEFINED && !(0..=8).contains(&config.cga_cluster_size) {
        fail(format!(
            "{NAME}: cgaClusterSize = {} is neither 0 to 8 nor undefined",
            config.cga_cluster_size
        ));
    }
}

fn folder_of(id: &UniqueId) -> PathBuf {
    let length = id.0.iter().position(|byte| *byte == 0).unwrap_or(ID_BYTES);
    match std::str::from_utf8(&id.0[..length]) {
        Ok(text) if length > 0 => text.into(),
        _ => fail("ncclCommInitRankConfig: this unique id is not from ncclGetUniqueId"),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(
    communicator: *mut c_void,
    error: *mut NcclResult,
) -> NcclResult {
    let answer = world().poll(communicator as usize);
    unsafe { error.write(answer) };
    SUCCESS
}

impl World {
    fn poll(&mut self, handle: usize) -> NcclResult {
        let communicator = self.communicators.get(handle, "ncclCommGetAsyncError");
        match communicator.phase {
            Phase::Joining => communicator.phase = joined(communicator),
            Phase::Launching { polls: 0 } => communicator.phase = Phase::Ready,
            Phase::Launching { polls } => {
                communicator.phase = Phase::Launching { polls: polls - 1 };
                return IN_PROGRESS;
            }
            Phase::Ready => {
                if let Some(error) = communicator.late_error {
                    communicator.phase = Phase::Broken(error);
                }
            }
            Phase::Finalizing => return self.poll_finalizing(handle),
            Phase::Stuck | Phase::Finalized | Phase::Broken(_) => {}
        }
        match communicator.phase {
            Phase::Broken(error) => error,
            Phase::Ready | Phase::Finalized => SUCCESS,
            _ => IN_PROGRESS,
        }
    }

    fn poll_finalizing(&mut self, handle: usize) -> NcclResult {
        let idle = self.is_idle(handle);
        let communicator = self.communicators.get(handle, "ncclCommGetAsyncError");
        let Some(board) = &communicator.board else { return IN_PROGRESS };
        if idle {
            board.own().state.store(board::FINALIZING, Ordering::Release);
        }
        if !board.all(board::FINALIZING) {
            return IN_PROGRESS;
        }
        communicator.phase = Phase::Finalized;
        SUCCESS
    }

    /// A communicator for its next use.
    fn ready(&mut self, handle: usize, function: &str) -> &mut Communicator {
        let title = self.communicators.title(handle);
        let communicator = self.communicators.get(handle, function);
        match communicator.phase {
            Phase::Ready => {}
            Phase::Finalizing | Phase::Finalized => {
                fail(format!("{function}: {title} is used after it was finalized"))
            }
            Phase::Broken(error) => fail(format!(
                "{function}: {title} is used after its error {error}; only an abort may follow"
            )),
            _ => fail(format!(
                "{function}: {title} is used while ncclInProgress; poll ncclCommGetAsyncError until it is not"
            )),
        }
        communicator
    }
}

/// What a rank that joins has come to: it waits until all have joined, and then looks at them.
fn joined(communicator: &Communicator) -> Phase {
    let Some(board) = &communicator.board else { return Phase::Stuck };
    for (rank, slot) in board.slots().iter().enumerate() {
        let (state, theirs) =
            (slot.state.load(Ordering::Acquire), slot.num_ranks.load(Ordering::Relaxed) as usize);
        if state == board::FAILED {
            fail(format!(
                "ncclCommGetAsyncError: rank {rank}, which was to join, has broken a rule"
            ));
        }
        if state >= board::JOINED && theirs != communicator.num_ranks {
            fail(format!(
                "ranks differ in the size of a communicator: this rank says {}, rank {rank} {theirs}",
                communicator.num_ranks
            ));
        }
    }
    if !board.all(board::JOINED) {
        return Phase::Joining;
    }
    let device = |rank: usize| board.slots()[rank].device.load(Ordering::Relaxed);
    let is_twice = (0..communicator.num_ranks)
        .any(|rank| rank != communicator.rank && device(rank) == device(communicator.rank));
    if is_twice { Phase::Broken(INVALID_USAGE) } else { Phase::Ready }
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommFinalize(communicator: *mut c_void) -> NcclResult {
    const NAME: &str = "ncclCommFinalize";
    let (mut world, handle) = (world(), communicator as usize);
    check_no_group(&world, NAME, handle);
    world.ready(handle, NAME).phase = Phase::Finalizing;
    IN_PROGRESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(communicator: *mut c_void) -> NcclResult {
    const NAME: &str = "ncclCommDestroy";
    let (mut world, handle) = (world(), communicator as usize);
    let (title, phase) =
        (world.communicators.title(handle), world.communicators.get(handle, NAME).phase);
    match phase {
        Phase::Finalized => {}
        Phase::Finalizing => fail(format!(
            "{NAME}: {title} is being finalized; poll ncclCommGetAsyncError until it is not in progress"
        )),
        _ => fail(format!("{NAME}: {title} was not finalized before, so the call blocks the host")),
    }
    if let Some(board) = world.communicators.remove(handle, NAME).board {
        board.leave(board::LEFT);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(communicator: *mut c_void) -> NcclResult {
    const NAME: &str = "ncclCommAbort";
    let (mut world, handle) = (world(), communicator as usize);
    // Also a hanging abort first ends what others do with the communicator.
    let gone = world.communicators.remove(handle, NAME);
    for group in world.groups.values_mut() {
        group.calls.retain(|call| call.communicator != handle);
    }
    world.forget(handle);
    drop(world);
    if let Some(board) = gone.board {
        board.leave(board::ABORTED);
    }
    while switches().abort_hangs {
        std::thread::park();
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCount(communicator: *mut c_void, count: *mut c_int) -> NcclResult {
    let num_ranks = world().ready(communicator as usize, "ncclCommCount").num_ranks;
    unsafe { count.write(num_ranks as c_int) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommUserRank(
    communicator: *mut c_void,
    rank: *mut c_int,
) -> NcclResult {
    let own = world().ready(communicator as usize, "ncclCommUserRank").rank;
    unsafe { rank.write(own as c_int) };
    SUCCESS
}

fn check_no_group(world: &World, function: &str, communicator: usize) {
    if world
        .groups
        .values()
        .any(|group| group.calls.iter().any(|call| call.communicator == communicator))
    {
        fail(format!(
            "{function}: a group with calls of {} is still open",
            world.communicators.title(communicator)
        ));
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> NcclResult {
    world().groups.entry(thread()).or_default().depth += 1;
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> NcclResult {
    let mut world = world();
    let Some(group) = world.groups.get_mut(&thread()) else {
        fail("ncclGroupEnd: no group is open on this thread")
    };
    group.depth -= 1;
    if group.depth > 0 {
        return SUCCESS;
    }
    let calls = world.groups.remove(&thread()).map_or(Vec::new(), |group| group.calls);
    let empty = calls.is_empty();
    world.launch(calls);
    if empty { SUCCESS } else { IN_PROGRESS }
}

fn issue(call: Call) -> NcclResult {
    let (mut world, name) = (world(), call.name());
    let num_ranks = world.ready(call.communicator, name).num_ranks;
    if let Collective::Broadcast { root } = call.collective
        && root >= num_ranks
    {
        fail(format!("{name}: there is no root {root} among {num_ranks} ranks"));
    }
    if call.stream <= 1 {
        fail(format!(
            "{name}: it was given the compute stream, where it hides behind no computation"
        ));
    }
    if !world.is_fresh(call.stream, name) {
        let title = world.streams.title(call.stream);
        fail(format!(
            "{name}: {title} has not waited for an event of the compute stream since its last launch, so its input may not be computed yet"
        ));
    }
    match world.groups.get_mut(&thread()) {
        Some(group) => {
            group.calls.push(call);
            SUCCESS
        }
        None => {
            world.launch(vec![call]);
            IN_PROGRESS
        }
    }
}

fn element(number: c_uint, function: &str) -> Element {
    Element::of(number)
        .unwrap_or_else(|| fail(format!("{function}: the double carries no type {number}")))
}

fn reduction(number: c_uint, function: &str) -> Reduction {
    Reduction::of(number)
        .unwrap_or_else(|| fail(format!("{function}: the double has no reduction {number}")))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclAllReduce(
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    kind: c_uint,
    op: c_uint,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> NcclResult {
    let (element, collective) =
        (element(kind, "all_reduce"), Collective::AllReduce(reduction(op, "all_reduce")));
    issue(call(collective, element, count, send, receive, communicator, stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclReduceScatter(
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    kind: c_uint,
    op: c_uint,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> NcclResult {
    let (element, collective) = (
        element(kind, "reduce_scatter"),
        Collective::ReduceScatter(reduction(op, "reduce_scatter")),
    );
    issue(call(collective, element, count, send, receive, communicator, stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclAllGather(
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    kind: c_uint,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> NcclResult {
    issue(call(
        Collective::AllGather,
        element(kind, "all_gather"),
        count,
        send,
        receive,
        communicator,
        stream,
    ))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclBroadcast(
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    kind: c_uint,
    root: c_int,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> NcclResult {
    let root = usize::try_from(root)
        .unwrap_or_else(|_| fail(format!("broadcast: there is no root {root}")));
    issue(call(
        Collective::Broadcast { root },
        element(kind, "broadcast"),
        count,
        send,
        receive,
        communicator,
        stream,
    ))
}

fn call(
    collective: Collective,
    element: Element,
    count: usize,
    send: *const c_void,
    receive: *mut c_void,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> Call {
    let (send, receive) = (send as usize, receive as usize);
    Call {
        collective,
        element,
        count,
        send,
        receive,
        communicator: communicator as usize,
        stream: stream as usize,
    }
}

/// Functions of NCCL that fm-dist has no need of.
macro_rules! absent {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> NcclResult {
            fail(concat!("the double has no ", stringify!($name)))
        }
    )* };
}

absent! { ncclCommInitRank ncclCommInitAll ncclCommSplit ncclCommShrink ncclCommRevoke ncclReduce ncclSend ncclRecv }
