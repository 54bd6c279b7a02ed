//! Records that ranks exchange before they are connected: JSON after a mark and a length. Any
//! process can connect, so nothing is trusted, waited for or stored beyond what a rank would send.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::one_line;

/// Changes when the format of records or frames changes.
const MARK: [u8; 8] = *b"fm-tcp\x00\x02";
const LENGTH_BYTES: usize = 4;

/// Longest record that a rank sends about itself.
pub const SHORT_BYTES: usize = 4096;

/// Timeout of sending a record: far longer than a peer that reads needs.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends a record. The socket blocks during the call and is non-blocking afterwards.
pub fn send_record(mut socket: &TcpStream, record: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(record)?;
    let length = u32::try_from(text.len()).map_err(io::Error::other)?;
    socket.set_nonblocking(false)?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    socket.write_all(&[&MARK[..], &length.to_le_bytes(), &text].concat())?;
    socket.set_nonblocking(true)
}

/// A connection, and the bytes of a record that have arrived on it.
pub struct Incoming {
    pub socket: TcpStream,
    pub address: SocketAddr,
    bytes: Vec<u8>,
}

/// Result of reading a record.
pub enum Received<T> {
    /// The record is not complete yet.
    Partial,
    Message(T),
    /// The bytes are not a record of this version; with the reason.
    Stranger(String),
}

impl Incoming {
    pub fn new(socket: TcpStream, address: SocketAddr) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Incoming { socket, address, bytes: Vec::new() })
    }

    /// Accepts all connections that are waiting.
    pub fn accept_all(listener: &TcpListener) -> io::Result<Vec<Self>> {
        let mut incoming = Vec::new();
        loop {
            match listener.accept() {
                Ok((socket, address)) => incoming.push(Incoming::new(socket, address)?),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => return Ok(incoming),
                    None | Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                        return Err(error);
                    }
                    // Errors of a single connection: the peer closed it before it was accepted, or
                    // the network lost it.
                    Some(_) => (),
                },
            }
        }
    }

    /// Reads a record of at most `limit` bytes, and nothing after it.
    pub fn receive<T: DeserializeOwned>(&mut self, limit: usize) -> Received<T> {
        let mut chunk = [0; SHORT_BYTES];
        loop {
            let due = match self.due(limit) {
                Ok(due) => due,
                Err(why) => return Received::Stranger(why),
            };
            let missing = due - self.bytes.len();
            if missing == 0 {
                let text = &self.bytes[MARK.len() + LENGTH_BYTES..];
                return serde_json::from_slice(text).map_or_else(
                    |error| Received::Stranger(one_line(&error.to_string())),
                    Received::Message,
                );
            }
            match self.socket.read(&mut chunk[..missing.min(SHORT_BYTES)]) {
                Ok(0) => return Received::Stranger("it closed its connection".into()),
                Ok(read) => self.bytes.extend(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Received::Partial;
                }
                Err(error) => return Received::Stranger(error.to_string()),
            }
        }
    }

    /// Bytes from the mark to the end of the record, as far as they are known yet.
    fn due(&self, limit: usize) -> Result<usize, String> {
        let known = self.bytes.len().min(MARK.len());
        if self.bytes[..known] != MARK[..known] {
            return Err("it does not say what a rank of this version says".into());
        }
        let Some(length) = self.bytes.get(MARK.len()..MARK.len() + LENGTH_BYTES) else {
            return Ok(MARK.len() + LENGTH_BYTES);
        };
        let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
        if length > limit {
            return Err(format!("it announced a record of {length} bytes, {limit} are the most"));
        }
        Ok(MARK.len() + LENGTH_BYTES + length)
    }

    /// True if the connection is open and the peer has sent nothing more.
    pub fn is_open_and_silent(&self) -> bool {
        let peeked = self.socket.peek(&mut [0]);
        peeked.is_err_and(|error| {
            [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind())
        })
    }
}

/// Blocks until one of the sockets is readable, or until the deadline; `false` at the deadline.
pub fn wait_until<'s>(
    until: Instant,
    sockets: impl Iterator<Item = BorrowedFd<'s>>,
) -> io::Result<bool> {
    let rest = until.saturating_duration_since(Instant::now());
    if rest.is_zero() {
        return Ok(false);
    }
    let mut sockets: Vec<PollFd<'_>> =
        sockets.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::IN)).collect();
    match poll(&mut sockets, Some(&Timespec::try_from(rest).map_err(io::Error::other)?)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
