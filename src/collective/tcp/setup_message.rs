//! What ranks say before they are connected: records of JSON behind a mark and a length. Anybody
//! may register_once, so that nothing is believed, waited for or stored beyond what a rank would say.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::one_line;

/// Changes when the records or frames do.
const MARK: [u8; 8] = *b"fm-tcp\x00\x02";
const LENGTH_BYTES: usize = 4;

/// What a rank says of itself is shorter.
pub const SHORT_BYTES: usize = 4096;

/// For a record to leave: far more than a peer that reads takes.
const SENDING_PATIENCE: Duration = Duration::from_secs(10);

/// Sends a record. The socket blocks for that, and not afterwards.
pub fn say(mut socket: &TcpStream, record: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(record)?;
    let length = u32::try_from(text.len()).map_err(io::Error::other)?;
    socket.set_nonblocking(false)?;
    socket.set_write_timeout(Some(SENDING_PATIENCE))?;
    socket.write_all(&[&MARK[..], &length.to_le_bytes(), &text].concat())?;
    socket.set_nonblocking(true)
}

/// Who has connected, and as much of a record as it has said.
pub struct Incoming {
    pub socket: TcpStream,
    pub address: SocketAddr,
    said: Vec<u8>,
}

pub enum Received<T> {
    /// Not all of it yet.
    Partial,
    Message(T),
    /// No rank of ours says this; why.
    Stranger(String),
}

impl Incoming {
    pub fn new(socket: TcpStream, address: SocketAddr) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Incoming { socket, address, said: Vec::new() })
    }

    /// Who has knocked since the last call.
    pub fn all_at(door: &TcpListener) -> io::Result<Vec<Self>> {
        let mut incoming = Vec::new();
        loop {
            match door.accept() {
                Ok((socket, address)) => incoming.push(Incoming::new(socket, address)?),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => return Ok(incoming),
                    None | Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                        return Err(error);
                    }
                    // Of one incoming: it went away again before it was let in, or the network lost
                    // it.
                    Some(_) => (),
                },
            }
        }
    }

    /// The record, of at most `limit` bytes, and nothing behind it.
    pub fn hear<T: DeserializeOwned>(&mut self, limit: usize) -> Received<T> {
        let mut chunk = [0; SHORT_BYTES];
        loop {
            let due = match self.due(limit) {
                Ok(due) => due,
                Err(why) => return Received::Stranger(why),
            };
            let missing = due - self.said.len();
            if missing == 0 {
                let text = &self.said[MARK.len() + LENGTH_BYTES..];
                return serde_json::from_slice(text).map_or_else(
                    |error| Received::Stranger(one_line(&error.to_string())),
                    Received::Message,
                );
            }
            match self.socket.read(&mut chunk[..missing.min(SHORT_BYTES)]) {
                Ok(0) => return Received::Stranger("it closed its connection".into()),
                Ok(bytes) => self.said.extend(&chunk[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Received::Partial;
                }
                Err(error) => return Received::Stranger(error.to_string()),
            }
        }
    }

    /// Bytes from the mark to the end of the record, as far as that is known.
    fn due(&self, limit: usize) -> Result<usize, String> {
        let known = self.said.len().min(MARK.len());
        if self.said[..known] != MARK[..known] {
            return Err("it does not say what a rank of this version says".into());
        }
        let Some(length) = self.said.get(MARK.len()..MARK.len() + LENGTH_BYTES) else {
            return Ok(MARK.len() + LENGTH_BYTES);
        };
        let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
        if length > limit {
            return Err(format!("it announced a record of {length} bytes, {limit} are the most"));
        }
        Ok(MARK.len() + LENGTH_BYTES + length)
    }

    /// Whether it is still there, with nothing more to say.
    pub fn is_silent(&self) -> bool {
        let peeked = self.socket.peek(&mut [0]);
        peeked.is_err_and(|error| {
            [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind())
        })
    }
}

/// Blocks until one of the sockets can be read; false if none can until then.
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
