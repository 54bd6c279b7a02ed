//! Programs of several processes: a test starts this binary once a rank, as one of the
//! [`programs`].

use std::ffi::c_void;
use std::process::{Child, Command, Stdio};
use std::ptr::{null_mut, without_provenance_mut};
use std::time::{Duration, Instant};

use super::programs;
use crate::cuda::*;
use crate::nccl::*;

pub const F32: u32 = 7;
pub const SUM: u32 = 0;
pub const IN_PROGRESS: u32 = 7;
pub const NOT_READY: u32 = 600;
/// Communicators that a program may make.
const MOST_COMMUNICATORS: usize = 3;

/// How one rank of a program ended.
#[derive(Debug)]
pub struct End {
    pub code: Option<i32>,
    pub output: String,
}

/// Runs `program` of [`programs`] once a rank.
pub fn launch(num_ranks: usize, program: &str, switches: &[(&str, &str)]) -> Vec<End> {
    let ids: Vec<String> = (0..MOST_COMMUNICATORS).map(|_| id_text(&new_id())).collect();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(programs::arguments(program)).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("DOUBLE_TEST_IDS", ids.join(",")).env("DOUBLE_TEST_RANK", rank.to_string());
        command
            .env("DOUBLE_TEST_RANKS", num_ranks.to_string())
            .env("NCCL_DOUBLE_PATIENCE_MS", "20000");
        command.envs(switches.iter().copied()).spawn().unwrap()
    };
    let children: Vec<Child> = (0..num_ranks).map(start).collect();
    let end = |child: Child| {
        let output = child.wait_with_output().unwrap();
        let [printed, told] =
            [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        End { code: output.status.code(), output: format!("{printed}\n{told}") }
    };
    let ends = children.into_iter().map(end).collect();
    // Programs that make fewer communicators, or end badly, leave folders that would stay as long
    // as this process lives.
    ids.iter().for_each(|folder| drop(std::fs::remove_dir_all(folder)));
    ends
}

pub fn expect_success(ends: &[End]) {
    assert!(
        ends.iter().all(|end| end.code == Some(0) && end.output.contains("1 passed")),
        "{ends:#?}"
    );
}

/// Some rank must say the sentence and end with the code of a broken rule.
pub fn expect_broken(ends: &[End], sentence: &str) {
    let says = |end: &End| {
        end.output
            .lines()
            .any(|line| line.starts_with("nccl double: rank ") && line.contains(sentence))
    };
    assert!(
        ends.iter().any(|end| end.code == Some(97) && says(end)),
        "no rank says {sentence:?}: {ends:#?}"
    );
}

pub fn new_id() -> UniqueId {
    let mut id = UniqueId([0; 128]);
    assert_eq!(unsafe { ncclGetUniqueId(&mut id) }, 0);
    id
}

fn id_text(id: &UniqueId) -> String {
    String::from_utf8(id.0.iter().copied().take_while(|byte| *byte != 0).collect()).unwrap()
}

/// What fm-dist gives to NCCL.
pub fn config(blocking: i32) -> Config {
    let undefined = i32::MIN;
    Config {
        size: size_of::<Config>(),
        magic: 0xcafe_beef,
        version: 22_907,
        blocking,
        cga_cluster_size: undefined,
        min_ctas: undefined,
        max_ctas: undefined,
        net_name: std::ptr::null(),
    }
}

/// One rank of a program, with a side stream and a communicator of all ranks.
pub struct Rank {
    pub rank: usize,
    pub ranks: usize,
    pub stream: *mut c_void,
    pub world: *mut c_void,
}

impl Rank {
    pub fn start() -> Self {
        let mut rank = Rank::without_communicator();
        rank.world = rank.communicator(0);
        rank
    }

    pub fn without_communicator() -> Self {
        let number = |name: &str| std::env::var(name).unwrap().parse::<usize>().unwrap();
        let (rank, ranks) = (number("DOUBLE_TEST_RANK"), number("DOUBLE_TEST_RANKS"));
        let mut context = null_mut();
        assert_eq!(cuInit(0), 0);
        assert_eq!(unsafe { cuDevicePrimaryCtxRetain(&mut context, rank as i32) }, 0);
        assert_eq!(cuCtxSetCurrent(context), 0);
        Rank { rank, ranks, stream: new_stream(), world: null_mut() }
    }

    pub fn id(&self, number: usize) -> UniqueId {
        let ids = std::env::var("DOUBLE_TEST_IDS").unwrap();
        let text = ids.split(',').nth(number).unwrap();
        let mut id = UniqueId([0; 128]);
        id.0[..text.len()].copy_from_slice(text.as_bytes());
        id
    }

    /// Joins communicator `number` of all ranks.
    pub fn communicator(&self, number: usize) -> *mut c_void {
        let mut communicator = null_mut();
        let (ranks, rank) = (self.ranks as i32, self.rank as i32);
        let result = unsafe {
            ncclCommInitRankConfig(&mut communicator, ranks, self.id(number), rank, &mut config(0))
        };
        assert_eq!(result, IN_PROGRESS);
        assert_eq!(settle(communicator), 0);
        communicator
    }

    /// Lets the side stream wait for what the program has computed.
    pub fn computed(&self) {
        let event = new_event();
        assert_eq!(cuEventRecord(event, null_mut()), 0);
        assert_eq!(cuStreamWaitEvent(self.stream, event, 0), 0);
        assert_eq!(cuEventDestroy_v2(event), 0);
    }

    pub fn all_reduce(&self, values: &mut [f32]) -> u32 {
        let (start, count) = (values.as_mut_ptr().cast::<c_void>(), values.len());
        ncclAllReduce(start, start, count, F32, SUM, self.world, self.stream)
    }

    /// An all-reduce in place as fm-dist does it, up to the event at its end.
    pub fn start_all_reduce(&self, values: &mut [f32]) -> *mut c_void {
        self.computed();
        assert_eq!(self.all_reduce(values), IN_PROGRESS);
        assert_eq!(settle(self.world), 0);
        self.end_of_stream()
    }

    pub fn end_of_stream(&self) -> *mut c_void {
        let event = new_event();
        assert_eq!(cuEventRecord(event, self.stream), 0);
        event
    }

    pub fn end(self) {
        finalize(self.world);
        assert_eq!(cuStreamDestroy_v2(self.stream), 0);
    }
}

/// Lets the compute stream wait for an event, and ends it.
pub fn wait(event: *mut c_void) {
    assert_eq!(cuStreamWaitEvent(null_mut(), event, 0), 0);
    assert_eq!(cuEventDestroy_v2(event), 0);
}

/// Polls until the communicator has settled; its error.
pub fn settle(communicator: *mut c_void) -> u32 {
    const LIMIT: Duration = Duration::from_secs(5);
    let (mut error, began) = (IN_PROGRESS, Instant::now());
    while error == IN_PROGRESS {
        assert!(began.elapsed() < LIMIT, "in progress for too long");
        std::thread::yield_now();
        error = poll(communicator);
    }
    error
}

pub fn poll(communicator: *mut c_void) -> u32 {
    let mut error = 0;
    assert_eq!(unsafe { ncclCommGetAsyncError(communicator, &mut error) }, 0);
    error
}

pub fn finalize(communicator: *mut c_void) {
    assert_eq!(ncclCommFinalize(communicator), IN_PROGRESS);
    assert_eq!(settle(communicator), 0);
    assert_eq!(ncclCommDestroy(communicator), 0);
}

pub fn new_event() -> *mut c_void {
    let mut event = null_mut();
    assert_eq!(unsafe { cuEventCreate(&mut event, 0) }, 0);
    event
}

pub fn new_stream() -> *mut c_void {
    let mut stream = null_mut();
    assert_eq!(unsafe { cuStreamCreate(&mut stream, 1) }, 0);
    stream
}

/// A handle that nobody made.
pub fn made_up() -> *mut c_void {
    without_provenance_mut(0x1230)
}
