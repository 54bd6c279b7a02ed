//! The connections of one process to all others, and the frames under way on them.
//!
//! All I/O happens in [`Mesh::wait`]. It polls every connection, so a peer is never blocked because
//! this rank waits for another one. No thread is used.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::super::call::Call;
use super::super::exchange::{Span, disagreement};
use super::connection::{Connection, unless_exiting};
use super::frame::{self, Frame, HEADER_BYTES};
use crate::error::{Error, Result, one_line};

/// Properties that all frames of one operation share.
pub struct Envelope {
    pub call: Call,
    /// This rank in the operation's communicator.
    pub rank: usize,
    /// Differs between operations, also between those of different communicators.
    pub tag: u64,
    pub name: String,
}

/// Frames that were started and are waited for, each as the peer's rank in the world and the
/// frame's number on that connection.
#[derive(Default)]
pub struct Messages {
    sent: Vec<(usize, u64)>,
    received: Vec<(usize, u64)>,
}

/// This process's connections by rank in the world; `None` at its own rank.
pub struct Mesh {
    peers: Vec<Option<Peer>>,
    is_broken: bool,
}

/// The connection to one peer, with its queues of frames.
struct Peer {
    connection: Arc<Connection>,
    outgoing: VecDeque<Outgoing>,
    sent: u64,
    due: VecDeque<Due>,
    received: u64,
    header: [u8; HEADER_BYTES],
    /// Bytes of the header, and of the piece after it, that have arrived.
    arrived_header: usize,
    arrived_body: usize,
    /// The peer sent a goodbye: it sends nothing else.
    has_left: bool,
    is_closed: bool,
    /// Writing failed; frames that the peer wrote before may still be read.
    is_write_broken: bool,
}

/// A frame to send.
struct Outgoing {
    header: [u8; HEADER_BYTES],
    body: Span,
    written: usize,
}

/// A frame to receive.
struct Due {
    envelope: Rc<Envelope>,
    /// The peer's rank in the operation's communicator.
    peer: usize,
    body: Span,
}

impl Mesh {
    /// A mesh over one connection to each other rank.
    pub fn new(world_size: usize, connections: Vec<Connection>) -> Self {
        let mut peers: Vec<Option<Peer>> = (0..world_size).map(|_| None).collect();
        for connection in connections {
            let rank = connection.rank;
            peers[rank] = Some(Peer::new(connection));
        }
        Mesh { peers, is_broken: false }
    }

    pub fn connections(&self) -> impl Iterator<Item = Arc<Connection>> {
        self.peers.iter().flatten().map(|peer| peer.connection.clone())
    }

    fn peer(&mut self, rank: usize) -> &mut Peer {
        self.peers[rank].as_mut().expect("no rank sends to itself")
    }

    /// Starts to send to rank `to` of the world.
    pub fn send(&mut self, messages: &mut Messages, envelope: &Envelope, body: Span, to: usize) {
        let header = frame::piece(body.bytes() as u64, envelope.tag, &envelope.name);
        let peer = self.peer(to);
        peer.outgoing.push_back(Outgoing { header, body, written: 0 });
        messages.sent.push((to, peer.sent + peer.outgoing.len() as u64));
    }

    /// Starts to receive from rank `from` of the world, which is rank `number` of the operation's
    /// communicator.
    pub fn receive(
        &mut self,
        messages: &mut Messages,
        envelope: &Rc<Envelope>,
        body: Span,
        (from, number): (usize, usize),
    ) {
        let peer = self.peer(from);
        peer.due.push_back(Due { envelope: envelope.clone(), peer: number, body });
        messages.received.push((from, peer.received + peer.due.len() as u64));
    }

    /// Serves all connections until these messages are complete.
    pub fn wait(&mut self, messages: &mut Messages, call: Call) -> Result<()> {
        if self.is_broken {
            return Err(call.error("the connections were given up after an earlier error"));
        }
        let outcome = self.serve(messages, call);
        self.is_broken |= outcome.is_err();
        outcome.map_err(unless_exiting)
    }

    fn serve(&mut self, messages: &mut Messages, call: Call) -> Result<()> {
        self.peers.iter_mut().flatten().for_each(Peer::write);
        // A frame that has been left unread may have no more bytes for which a socket would wake.
        let mut expected = self.peers.iter_mut().flatten().filter(|peer| peer.is_expected());
        expected.try_for_each(|peer| peer.read(call))?;
        loop {
            messages.sent.retain(|(to, number)| {
                self.peers[*to].as_ref().is_some_and(|peer| peer.sent < *number)
            });
            messages.received.retain(|(from, number)| {
                self.peers[*from].as_ref().is_some_and(|peer| peer.received < *number)
            });
            if messages.sent.is_empty() && messages.received.is_empty() {
                return Ok(());
            }
            self.peers.iter().flatten().try_for_each(|peer| peer.check(call))?;
            self.pause(call)?;
        }
    }

    /// Blocks until a connection is ready, and serves those that are.
    fn pause(&mut self, call: Call) -> Result<()> {
        let open: Vec<usize> = (0..self.peers.len())
            .filter(|rank| self.peers[*rank].as_ref().is_some_and(|peer| !peer.is_closed))
            .collect();
        let events: Vec<PollFlags> = {
            let peers = open.iter().filter_map(|rank| self.peers[*rank].as_ref());
            let mut sockets: Vec<PollFd<'_>> =
                peers.map(|peer| PollFd::new(&peer.connection.socket, peer.interest())).collect();
            match poll(&mut sockets, None) {
                // A signal interrupted the poll: nothing is known of the sockets.
                Err(Errno::INTR) => return Ok(()),
                other => other
                    .map_err(|error| call.error(format!("cannot wait for the peers: {error}")))?,
            };
            sockets.iter().map(PollFd::revents).collect()
        };
        for (rank, events) in open.into_iter().zip(events).filter(|(_, events)| !events.is_empty())
        {
            let peer = self.peer(rank);
            if peer.is_ahead() && events.intersects(PollFlags::HUP | PollFlags::ERR) {
                peer.is_write_broken = true;
            }
            if events.contains(PollFlags::OUT) {
                peer.write();
            }
            peer.read(call)?;
        }
        Ok(())
    }
}

impl Drop for Mesh {
    /// Sends a goodbye. A peer that still waits for this rank reports the closed connection as an
    /// error; for the others this rank has left in good order.
    fn drop(&mut self) {
        if !self.is_broken {
            self.connections().for_each(|connection| connection.try_send(&Frame::Goodbye));
        }
    }
}

impl Peer {
    fn new(connection: Connection) -> Self {
        Peer {
            connection: Arc::new(connection),
            outgoing: VecDeque::new(),
            sent: 0,
            due: VecDeque::new(),
            received: 0,
            header: [0; HEADER_BYTES],
            arrived_header: 0,
            arrived_body: 0,
            has_left: false,
            is_closed: false,
            is_write_broken: false,
        }
    }

    /// True if the peer has started an operation that this rank has not: its frame is left unread
    /// until then.
    fn is_ahead(&self) -> bool {
        self.arrived_header == HEADER_BYTES && self.due.is_empty()
    }

    /// True if this rank has come to the operation of a frame that was left unread.
    fn is_expected(&self) -> bool {
        self.arrived_header == HEADER_BYTES && !self.due.is_empty()
    }

    fn interest(&self) -> PollFlags {
        let read = if self.is_ahead() { PollFlags::empty() } else { PollFlags::IN };
        let write = if self.outgoing.is_empty() || self.is_write_broken {
            PollFlags::empty()
        } else {
            PollFlags::OUT
        };
        read | write
    }

    /// Fails as soon as a peer is found to be gone, unless it has said goodbye and no frame from or
    /// to it is outstanding.
    fn check(&self, call: Call) -> Result<()> {
        let is_wanted = !self.has_left || !self.due.is_empty() || !self.outgoing.is_empty();
        if is_wanted && (self.is_closed || (self.is_write_broken && self.is_ahead())) {
            return Err(call.error(format!("{} closed its connection", self.connection.peer())));
        }
        Ok(())
    }

    /// Writes as much as the socket takes.
    fn write(&mut self) {
        while !self.is_write_broken
            && let Some(first) = self.outgoing.front_mut()
        {
            let (header, body) =
                (first.written.min(HEADER_BYTES), first.written.saturating_sub(HEADER_BYTES));
            match first.body.read(body, |body| self.connection.write(&first.header[header..], body))
            {
                Ok(written) => first.written += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The frame that tells why the peer ended may still arrive.
                Err(_) => self.is_write_broken = true,
            }
            if first.written == HEADER_BYTES + first.body.bytes() {
                self.outgoing.pop_front();
                self.sent += 1;
            }
        }
    }

    /// Reads the bytes that have arrived, up to the end of the last expected frame.
    fn read(&mut self, call: Call) -> Result<()> {
        loop {
            if self.arrived_header < HEADER_BYTES {
                let result =
                    (&self.connection.socket).read(&mut self.header[self.arrived_header..]);
                match self.count(result) {
                    Some(bytes) => self.arrived_header += bytes,
                    None => return Ok(()),
                }
                continue;
            }
            let Some(body) = self.expected(call)? else { return Ok(()) };
            while self.arrived_body < body.bytes() {
                let result =
                    body.write(self.arrived_body, |rest| (&self.connection.socket).read(rest));
                match self.count(result) {
                    Some(bytes) => self.arrived_body += bytes,
                    None => return Ok(()),
                }
            }
            (self.arrived_header, self.arrived_body) = (0, 0);
            self.due.pop_front();
            self.received += 1;
            if self.due.is_empty() {
                return Ok(());
            }
        }
    }

    /// Returns the number of bytes read; `None` if there are no more at present.
    fn count(&mut self, result: io::Result<usize>) -> Option<usize> {
        match result {
            Ok(0) => self.is_closed = true,
            Ok(bytes) => return Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Some(0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
            Err(_) => self.is_closed = true,
        }
        None
    }

    /// Returns the span to receive the bytes after the header; `None` if there are none, or if they
    /// must wait until this rank reaches their operation.
    fn expected(&mut self, call: Call) -> Result<Option<Span>> {
        let peer = self.connection.peer();
        let lost = || call.error(format!("{peer} sent what is no frame"));
        let (length, tag, name) = match Frame::decode(&self.header).ok_or_else(lost)? {
            Frame::Piece { length, tag, name } => (length, tag, name),
            Frame::Goodbye => {
                self.has_left = true;
                (self.arrived_header, self.arrived_body) = (0, 0);
                return Ok(None);
            }
            Frame::Failed { code } => {
                return Err(Error::Peer {
                    speaker: None,
                    code,
                    what: format!("{peer} ended the run with exit code {code}"),
                });
            }
        };
        let Some(Due { envelope, peer: number, body }) = self.due.front() else { return Ok(None) };
        if tag != envelope.tag {
            return Err(disagreement(*number, &one_line(&name), envelope.rank, &envelope.name));
        }
        if length != body.bytes() as u64 {
            let (bytes, name) = (body.bytes(), &envelope.name);
            return Err(
                call.error(format!("{peer} announced {length} bytes in {name}, {bytes} are due"))
            );
        }
        Ok(Some(*body))
    }
}
