//! The connection to one peer, and the announcement over all connections that this process ends.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

use super::frame::{Frame, HEADER_BYTES};

/// TCP keepalive: idle time before the first probe, then the interval and number of probes, so that
/// a dead machine is noticed after a minute. While data are in transit the kernel's retransmission
/// timeout applies instead; a watchdog is quicker.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// Time that peers get to read the announcement of a failure.
const DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// Attempts to get a connection on which another thread writes at the moment, which takes
/// microseconds.
const ATTEMPTS: usize = 10_000;

/// The connections of the world that [`announce_failure`] ends.
static CONNECTIONS: Mutex<Vec<Arc<Connection>>> = Mutex::new(Vec::new());

/// True while the failure of this process is being announced.
static IS_EXITING: AtomicBool = AtomicBool::new(false);

/// The socket to one peer.
pub struct Connection {
    /// The peer's rank in the world.
    pub rank: usize,
    pub host: String,
    pub socket: TcpStream,
    /// True if a frame was written in part: no other frame may be written before its end.
    is_within_frame: Mutex<bool>,
}

impl Connection {
    pub fn new(rank: usize, host: String, socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_PROBES)?;
        Ok(Connection { rank, host, socket, is_within_frame: Mutex::new(false) })
    }

    /// The peer in a message: `rank 2 (host n3)`.
    pub fn peer(&self) -> String {
        format!("rank {} (host {})", self.rank, self.host)
    }

    /// Writes as much of the rest of a frame as the socket takes; returns the number of bytes.
    pub fn write(&self, header: &[u8], body: &[u8]) -> io::Result<usize> {
        let mut is_within_frame =
            self.is_within_frame.lock().unwrap_or_else(PoisonError::into_inner);
        let written = (&self.socket).write_vectored(&[IoSlice::new(header), IoSlice::new(body)])?;
        *is_within_frame = written < header.len() + body.len();
        Ok(written)
    }

    /// Sends a frame without a body, if that is possible at once and between two other frames. May
    /// be called from any thread.
    pub fn try_send(&self, frame: &Frame) {
        let free = (0..ATTEMPTS).find_map(|_| match self.is_within_frame.try_lock() {
            Ok(within) => Some(within),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                std::thread::yield_now();
                None
            }
        });
        if let Some(mut is_within_frame) = free.filter(|within| !**within) {
            // A socket buffer that takes only a part of 128 bytes is full of data that the peer
            // does not read: nothing more will be sent.
            let written = (&self.socket).write(&frame.encode()).unwrap_or(0);
            *is_within_frame = !written.is_multiple_of(HEADER_BYTES);
        }
    }
}

/// Keeps these connections open until [`release_connections`] or the end of the process, which
/// [`announce_failure`] announces on them.
pub fn keep_open(connections: impl Iterator<Item = Arc<Connection>>) {
    CONNECTIONS.lock().unwrap_or_else(PoisonError::into_inner).extend(connections);
}

/// Drops the connections of the world after it has ended in good order.
pub fn release_connections() {
    CONNECTIONS.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// Tells all peers that this process ends the world with exit code `code`, and waits a moment for
/// them to read it. May be called from any thread, whatever the others do. Best effort.
pub fn announce_failure(code: i32) {
    let connections = match CONNECTIONS.try_lock() {
        Ok(connections) => connections.clone(),
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().clone(),
        Err(TryLockError::WouldBlock) => return,
    };
    IS_EXITING.store(true, Ordering::SeqCst);
    for connection in &connections {
        connection.try_send(&Frame::Failed { code });
        let _ = connection.socket.shutdown(Shutdown::Write);
    }
    drain(connections);
}

/// Blocks until the peer `rank` of the world has closed its connection, for at most `limit`; `None`
/// without such a connection. Returns `true` if the peer has announced its failure before. No other
/// thread reads the connection any more.
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
            Ok(0) => return Some(announces_failure(&last)),
            Ok(bytes) => {
                last.extend_from_slice(&unread[..bytes]);
                last.drain(..last.len().saturating_sub(HEADER_BYTES));
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => return Some(announces_failure(&last)),
        }
    }
    Some(false)
}

/// True if these bytes, the last that a peer sent, announce its failure.
fn announces_failure(bytes: &[u8]) -> bool {
    bytes.try_into().is_ok_and(|header| matches!(Frame::decode(header), Some(Frame::Failed { .. })))
}

/// Blocks forever if another thread is already shutting the process down; otherwise returns
/// `error`.
pub fn unless_exiting<T>(error: T) -> T {
    while IS_EXITING.load(Ordering::SeqCst) {
        std::thread::park();
    }
    error
}

/// Reads and drops data until the peers have closed: closing a socket with unread data would
/// discard what it has not delivered yet.
fn drain(mut connections: Vec<Arc<Connection>>) {
    let began = Instant::now();
    let mut unread = vec![0; 1 << 16];
    while !connections.is_empty() && began.elapsed() < DRAIN_LIMIT {
        let rest = DRAIN_LIMIT.saturating_sub(began.elapsed());
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
