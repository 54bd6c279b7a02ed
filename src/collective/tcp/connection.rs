//! A connection with one peer, and the last words over all of them when this process must end.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

use super::frame::{Frame, HEADER_BYTES};

/// How long a silent connection stays unquestioned, and between questions: a machine that is gone
/// is noticed after a minute. While data are on their way the kernel asks in its own time; a
/// watchdog is quicker.
const SILENCE: Duration = Duration::from_secs(30);
const QUESTIONS: (Duration, u32) = (Duration::from_secs(10), 3);

/// How long peers get to take the last words.
const LAST_WORDS_PATIENCE: Duration = Duration::from_millis(500);

/// Attempts to write to a connection on which another thread writes just now, which takes it
/// microseconds.
const ATTEMPTS: usize = 10_000;

/// The connections of the world that this process lives and dies with.
static CONNECTIONS: Mutex<Vec<Arc<Connection>>> = Mutex::new(Vec::new());

/// Whether the last words are being said.
static IS_ENDING: AtomicBool = AtomicBool::new(false);

pub struct Connection {
    /// The peer: its rank in the world, and where it runs.
    pub rank: usize,
    pub host: String,
    pub socket: TcpStream,
    /// Whether a frame has begun and not ended: another one must not be put into it.
    is_within_frame: Mutex<bool>,
}

impl Connection {
    pub fn new(rank: usize, host: String, socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, SILENCE)?;
        sockopt::set_tcp_keepintvl(&socket, QUESTIONS.0)?;
        sockopt::set_tcp_keepcnt(&socket, QUESTIONS.1)?;
        Ok(Connection { rank, host, socket, is_within_frame: Mutex::new(false) })
    }

    /// `rank 2 (host n3)`.
    pub fn peer(&self) -> String {
        format!("rank {} (host {})", self.rank, self.host)
    }

    /// Writes of a frame's rest what the socket takes; returns how much.
    pub fn write(&self, header: &[u8], body: &[u8]) -> io::Result<usize> {
        let mut is_within_frame =
            self.is_within_frame.lock().unwrap_or_else(PoisonError::into_inner);
        let written = (&self.socket).write_vectored(&[IoSlice::new(header), IoSlice::new(body)])?;
        *is_within_frame = written < header.len() + body.len();
        Ok(written)
    }

    /// Sends a frame without a body if that can be done at once and between two others. From any
    /// thread.
    pub fn say(&self, frame: &Frame) {
        let free = (0..ATTEMPTS).find_map(|_| match self.is_within_frame.try_lock() {
            Ok(within) => Some(within),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                std::thread::yield_now();
                None
            }
        });
        if let Some(mut is_within_frame) = free.filter(|within| !**within) {
            // A buffer that takes a part of so little is full of what nobody reads: nothing more
            // will be sent.
            let written = (&self.socket).write(&frame.encode()).unwrap_or(0);
            *is_within_frame = !written.is_multiple_of(HEADER_BYTES);
        }
    }
}

/// From now on these connections stay open until [`let_go`] or the end of the process, which
/// [`last_words`] announces.
pub fn hold(connections: impl Iterator<Item = Arc<Connection>>) {
    CONNECTIONS.lock().unwrap_or_else(PoisonError::into_inner).extend(connections);
}

/// The connections of the world end in good order.
pub fn let_go() {
    CONNECTIONS.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// Tells all peers that this process ends the world with exit code `code`, and waits a moment for
/// them to hear it. From any thread, whatever the others do; nothing is promised.
pub fn last_words(code: i32) {
    let connections = match CONNECTIONS.try_lock() {
        Ok(connections) => connections.clone(),
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().clone(),
        Err(TryLockError::WouldBlock) => return,
    };
    IS_ENDING.store(true, Ordering::SeqCst);
    for connection in &connections {
        connection.say(&Frame::Failed { code });
        let _ = connection.socket.shutdown(Shutdown::Write);
    }
    outlast(connections);
}

/// Waits until the peer `rank` of the world has closed its connection, for `limit` at most; `None`
/// without such a connection. Returns `true` if it said its last words before. Nobody else reads
/// the connection any more.
pub fn wait_for_end(rank: usize, limit: Duration) -> Option<bool> {
    let connection = CONNECTIONS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
        .find(|connection| connection.rank == rank)
        .cloned()?;
    let (began, mut unread, mut last) = (Instant::now(), vec![0; 1 << 16], Vec::new());
    while began.elapsed() < limit {
        let rest = Timespec::try_from(limit.saturating_sub(began.elapsed())).ok();
        let _ = poll(&mut [PollFd::new(&connection.socket, PollFlags::IN)], rest.as_ref());
        match (&connection.socket).read(&mut unread) {
            Ok(0) => return Some(is_last_word(&last)),
            Ok(bytes) => {
                last.extend_from_slice(&unread[..bytes]);
                last.drain(..last.len().saturating_sub(HEADER_BYTES));
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => return Some(is_last_word(&last)),
        }
    }
    Some(false)
}

/// Tells whether these bytes, the last that a peer sent, announce the end of the world.
fn is_last_word(bytes: &[u8]) -> bool {
    bytes.try_into().is_ok_and(|header| matches!(Frame::decode(header), Some(Frame::Failed { .. })))
}

/// What a thread does that finds its connections closed because another one says the last words:
/// the end is near, and its reason has been told.
pub fn unless_ending<T>(error: T) -> T {
    while IS_ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
    error
}

/// Reads whatever comes until the peers have closed: a socket that is closed with data unread takes
/// back what it has not delivered.
fn outlast(mut connections: Vec<Arc<Connection>>) {
    let began = Instant::now();
    let mut unread = vec![0; 1 << 16];
    while !connections.is_empty() && began.elapsed() < LAST_WORDS_PATIENCE {
        let rest = LAST_WORDS_PATIENCE.saturating_sub(began.elapsed());
        let mut sockets: Vec<PollFd<'_>> = connections
            .iter()
            .map(|connection| PollFd::new(&connection.socket, PollFlags::IN))
            .collect();
        let _ = poll(&mut sockets, Timespec::try_from(rest).ok().as_ref());
        let is_open = |connection: &Arc<Connection>| match (&connection.socket).read(&mut unread) {
            Ok(bytes) => bytes > 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        drop(sockets);
        connections.retain(is_open);
    }
}
