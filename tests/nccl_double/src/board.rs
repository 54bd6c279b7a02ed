//! Where the ranks of one communicator meet: a folder that the unique id names, with a board of one
//! slot a rank in shared memory and a file for each operation and rank until everyone has read it.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::failure::fail;
use crate::switches::switches;

/// What stands in front of a folder's name; the number of the process that made the id follows.
const PREFIX: &str = "nccl-double-";

/// Most ranks that a communicator can have here.
pub const MOST_RANKS: usize = 1024;

/// What a rank has come to. From [`LEFT`] on it takes part in nothing any more.
pub const JOINED: u32 = 1;
pub const FINALIZING: u32 = 2;
pub const LEFT: u32 = 3;
pub const ABORTED: u32 = 4;
pub const FAILED: u32 = 5;

/// One rank's part of the board, a cache line of its own.
#[repr(C, align(64))]
#[derive(Default)]
pub struct Slot {
    pub process: AtomicU32,
    pub state: AtomicU32,
    pub num_ranks: AtomicU32,
    /// Ordinal of the GPU, and of the process that has it.
    pub device: AtomicU32,
    /// Operations whose files lie in the folder.
    pub posted: AtomicU64,
    /// Operations that this rank has finished.
    pub finished: AtomicU64,
    /// One more than the number of the operation that this rank's host waits for; 0: none.
    pub waits: AtomicU64,
}

/// The board of one communicator as one rank holds it. Never unmapped: slots are left at the
/// process's end.
pub struct Board {
    pub folder: PathBuf,
    pub rank: usize,
    slots: &'static [Slot],
}

/// All slots of this process, for its end.
static OWN: Mutex<Vec<(&'static Slot, PathBuf, &'static [Slot])>> = Mutex::new(Vec::new());

/// Makes the folder of a new communicator; its path is the unique id.
pub fn new_folder() -> PathBuf {
    let parent = switches().folder.clone().unwrap_or_else(default_parent);
    sweep(&parent);
    static MADE: AtomicU32 = AtomicU32::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let folder = parent.join(format!("{PREFIX}{}-{number}-{now:x}", std::process::id()));
    let made = fs::create_dir(&folder).and_then(|()| {
        File::create(folder.join("board"))?.set_len((MOST_RANKS * size_of::<Slot>()) as u64)
    });
    made.unwrap_or_else(|error| fail(format!("cannot make {}: {error}", folder.display())));
    folder
}

/// Memory where there is enough of it.
fn default_parent() -> PathBuf {
    const ENOUGH: u64 = 2 << 30;
    // SAFETY: plain numbers, for which zero is a value.
    let mut space: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a path that ends in a zero, and a place for the answer.
    let known = unsafe { libc::statvfs(c"/dev/shm".as_ptr(), &mut space) } == 0;
    if known && space.f_bavail * space.f_frsize >= ENOUGH {
        "/dev/shm".into()
    } else {
        std::env::temp_dir()
    }
}

/// Removes the folders of communicators of which nobody lives.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let maker = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if maker.is_some_and(|maker| !lives(maker))
            && members(&entry.path()).into_iter().all(|member| !lives(member))
        {
            // Another process may be sweeping too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn members(folder: &Path) -> Vec<u32> {
    let bytes = fs::read(folder.join("board")).unwrap_or_default();
    let first = |slot: &[u8]| u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]);
    bytes
        .as_chunks::<{ size_of::<Slot>() }>()
        .0
        .iter()
        .map(|slot| first(slot))
        .filter(|process| *process != 0)
        .collect()
}

/// Whether a process of this number is there and has not ended.
pub fn lives(process: u32) -> bool {
    // One that its parent has not buried yet still has a number.
    if fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| stat.contains(") Z ")) {
        return false;
    }
    // SAFETY: signal 0 only asks.
    let answer = unsafe { libc::kill(process as i32, 0) };
    answer == 0 || Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

impl Board {
    /// Takes this rank's slot; `device` is the ordinal of its GPU.
    pub fn join(folder: PathBuf, rank: usize, num_ranks: usize, device: u32) -> Self {
        let slots = map(&folder.join("board"));
        let own = &slots[rank];
        if own
            .process
            .compare_exchange(0, std::process::id(), Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            fail(format!(
                "rank {rank} of a communicator of {num_ranks} is taken by another process"
            ));
        }
        own.num_ranks.store(num_ranks as u32, Ordering::Relaxed);
        own.device.store(device, Ordering::Relaxed);
        own.state.store(JOINED, Ordering::Release);
        let board = Board { folder: folder.clone(), rank, slots: &slots[..num_ranks] };
        OWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((
            own,
            folder,
            board.slots,
        ));
        board
    }

    pub fn slots(&self) -> &[Slot] {
        self.slots
    }

    pub fn own(&self) -> &Slot {
        &self.slots[self.rank]
    }

    /// Whether every rank has come to `state` or further.
    pub fn all(&self, state: u32) -> bool {
        self.slots.iter().all(|slot| slot.state.load(Ordering::Acquire) >= state)
    }

    /// File of an operation of a rank.
    pub fn file(&self, rank: usize, operation: u64) -> PathBuf {
        self.folder.join(format!("{operation}-of-{rank}"))
    }

    /// Removes this rank's files that everyone has read, of those from `first` on; returns the
    /// first that stays.
    pub fn prune(&self, first: u64) -> u64 {
        let finished =
            self.slots.iter().map(|slot| slot.finished.load(Ordering::Acquire)).min().unwrap_or(0);
        for operation in first..finished {
            let _ = fs::remove_file(self.file(self.rank, operation));
        }
        finished.max(first)
    }

    /// Takes part no more.
    pub fn leave(&self, state: u32) {
        leave(self.own(), &self.folder, self.slots, state);
    }
}

/// Whoever leaves last takes the folder along.
fn leave(own: &Slot, folder: &Path, slots: &[Slot], state: u32) {
    if own.state.load(Ordering::Acquire) < LEFT {
        own.state.store(state, Ordering::Release);
    }
    if slots.iter().all(|slot| slot.state.load(Ordering::Acquire) >= LEFT) {
        let _ = fs::remove_dir_all(folder);
    }
}

/// Leaves every communicator, at the process's end.
pub fn leave_all(state: u32) {
    for (own, folder, slots) in OWN.try_lock().iter().flat_map(|boards| boards.iter()) {
        leave(own, folder, slots, state);
    }
}

fn map(path: &Path) -> &'static [Slot] {
    let length = MOST_RANKS * size_of::<Slot>();
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.unwrap_or_else(|error| {
        fail(format!("unknown or outdated unique id: cannot open {}: {error}", path.display()))
    });
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping of a file of this length; the kernel chooses its place.
    let start = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    if start == libc::MAP_FAILED {
        fail(format!("cannot map {}: {}", path.display(), Error::last_os_error()));
    }
    // SAFETY: the mapping is page-aligned, as long as the slots, of atomics only, and never
    // unmapped.
    unsafe { std::slice::from_raw_parts(start.cast(), MOST_RANKS) }
}

/// Writes bytes and then memory of the program into a new file; false if some of the memory is not
/// mapped.
pub fn write_file(path: &Path, head: &[u8], payload: crate::memory::Span) -> bool {
    let mut file = File::create(path)
        .unwrap_or_else(|error| fail(format!("cannot write {}: {error}", path.display())));
    file.write_all(head)
        .unwrap_or_else(|error| fail(format!("cannot write {}: {error}", path.display())));
    let mut written = 0;
    while written < payload.length {
        let from = (payload.start + written) as *const libc::c_void;
        // SAFETY: the kernel reads the memory and refuses what is not mapped.
        match unsafe { libc::write(file.as_raw_fd(), from, payload.length - written) } {
            more if more > 0 => written += more as usize,
            _ if Error::last_os_error().raw_os_error() == Some(libc::EFAULT) => return false,
            _ => fail(format!("cannot write {}: {}", path.display(), Error::last_os_error())),
        }
    }
    true
}
