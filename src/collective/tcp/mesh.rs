//! The connections of one process with all others, and the frames under way on them.
//!
//! Nothing moves but in [`Mesh::wait`], which serves all connections while it waits for some: no
//! thread, and no peer that could not send because this rank waits for another one.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::super::call::Call;
use super::super::exchange::{Span, disagreement};
use super::connection::{Connection, unless_ending};
use super::frame::{self, Frame, HEADER_BYTES};
use crate::error::{Error, Result, one_line};

/// What the frames of one operation have in common.
pub struct Envelope {
    pub call: Call,
    /// This rank's number in the operation's communicator.
    pub rank: usize,
    /// Differs between operations, also of different communicators.
    pub tag: u64,
    pub name: String,
}

/// Frames that were started, each with the peer's number in the world.
#[derive(Default)]
pub struct Messages {
    sent: Vec<(usize, u64)>,
    received: Vec<(usize, u64)>,
}

/// This process's connections by rank; none with itself.
pub struct Mesh {
    peers: Vec<Option<Peer>>,
    is_broken: bool,
}

struct Peer {
    connection: Arc<Connection>,
    outgoing: VecDeque<Outgoing>,
    sent: u64,
    due: VecDeque<Due>,
    received: u64,
    header: [u8; HEADER_BYTES],
    /// Bytes that have arrived of the header, and of what comes behind it.
    arrived: (usize, usize),
    /// It said that nothing else comes.
    has_left: bool,
    is_closed: bool,
    /// Nothing can be written any more; what it wrote may still be read.
    is_deaf: bool,
}

struct Outgoing {
    header: [u8; HEADER_BYTES],
    body: Span,
    written: usize,
}

struct Due {
    envelope: Rc<Envelope>,
    /// The peer's number in the operation's communicator.
    peer: usize,
    body: Span,
}

impl Mesh {
    /// The connections to all others.
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

    /// Starts to send to a rank of the world.
    pub fn send(&mut self, messages: &mut Messages, envelope: &Envelope, body: Span, to: usize) {
        let header = frame::piece(body.bytes() as u64, envelope.tag, &envelope.name);
        let peer = self.peer(to);
        peer.outgoing.push_back(Outgoing { header, body, written: 0 });
        messages.sent.push((to, peer.sent + peer.outgoing.len() as u64));
    }

    /// Starts to receive from rank `from` of the world, which is number `number` of the operation's
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

    /// Serves all connections until these messages are through.
    pub fn wait(&mut self, messages: &mut Messages, call: Call) -> Result<()> {
        if self.is_broken {
            return Err(call.error("the connections were given up after an earlier error"));
        }
        let outcome = self.serve(messages, call);
        self.is_broken |= outcome.is_err();
        outcome.map_err(unless_ending)
    }

    fn serve(&mut self, messages: &mut Messages, call: Call) -> Result<()> {
        self.peers.iter_mut().flatten().for_each(Peer::write);
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

    /// Blocks until a connection can be served, and serves it.
    fn pause(&mut self, call: Call) -> Result<()> {
        let open: Vec<usize> = (0..self.peers.len())
            .filter(|rank| self.peers[*rank].as_ref().is_some_and(|peer| !peer.is_closed))
            .collect();
        let events: Vec<PollFlags> = {
            let peers = open.iter().filter_map(|rank| self.peers[*rank].as_ref());
            let mut sockets: Vec<PollFd<'_>> =
                peers.map(|peer| PollFd::new(&peer.connection.socket, peer.interest())).collect();
            match poll(&mut sockets, None) {
                // A signal: nothing is known of the sockets.
                Err(Errno::INTR) => return Ok(()),
                other => other
                    .map_err(|error| call.error(format!("cannot wait for the peers: {error}")))?,
            };
            sockets.iter().map(PollFd::revents).collect()
        };
        for (rank, events) in open.into_iter().zip(events).filter(|(_, events)| !events.is_empty())
        {
            let peer = self.peer(rank);
            if peer.awaits_its_turn() && events.intersects(PollFlags::HUP | PollFlags::ERR) {
                peer.is_deaf = true;
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
    /// Who waits for this rank sees its connection closed; for all others it has just left.
    fn drop(&mut self) {
        if !self.is_broken {
            self.connections().for_each(|connection| connection.say(&Frame::Goodbye));
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
            arrived: (0, 0),
            has_left: false,
            is_closed: false,
            is_deaf: false,
        }
    }

    /// Whether it has begun with an operation to which this rank has yet to come: then it must wait
    /// with the rest.
    fn awaits_its_turn(&self) -> bool {
        self.arrived.0 == HEADER_BYTES && self.due.is_empty()
    }

    fn interest(&self) -> PollFlags {
        let read = if self.awaits_its_turn() { PollFlags::empty() } else { PollFlags::IN };
        let write = if self.outgoing.is_empty() || self.is_deaf {
            PollFlags::empty()
        } else {
            PollFlags::OUT
        };
        read | write
    }

    /// A peer that is gone is an error as soon as it is seen, unless it has taken leave and nothing
    /// is wanted of it.
    fn check(&self, call: Call) -> Result<()> {
        let is_wanted = !self.has_left || !self.due.is_empty() || !self.outgoing.is_empty();
        if is_wanted && (self.is_closed || (self.is_deaf && self.awaits_its_turn())) {
            return Err(call.error(format!("{} closed its connection", self.connection.peer())));
        }
        Ok(())
    }

    /// Writes what the socket takes.
    fn write(&mut self) {
        while !self.is_deaf
            && let Some(first) = self.outgoing.front_mut()
        {
            let (header, body) =
                (first.written.min(HEADER_BYTES), first.written.saturating_sub(HEADER_BYTES));
            match first.body.read(body, |body| self.connection.write(&first.header[header..], body))
            {
                Ok(written) => first.written += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Its last words may still be on their way here.
                Err(_) => self.is_deaf = true,
            }
            if first.written == HEADER_BYTES + first.body.bytes() {
                self.outgoing.pop_front();
                self.sent += 1;
            }
        }
    }

    /// Reads what has arrived, up to the end of what is due.
    fn read(&mut self, call: Call) -> Result<()> {
        loop {
            if self.arrived.0 < HEADER_BYTES {
                let result = (&self.connection.socket).read(&mut self.header[self.arrived.0..]);
                match self.count(result) {
                    Some(bytes) => self.arrived.0 += bytes,
                    None => return Ok(()),
                }
                continue;
            }
            let Some(body) = self.expected(call)? else { return Ok(()) };
            while self.arrived.1 < body.bytes() {
                let result =
                    body.write(self.arrived.1, |rest| (&self.connection.socket).read(rest));
                match self.count(result) {
                    Some(bytes) => self.arrived.1 += bytes,
                    None => return Ok(()),
                }
            }
            self.arrived = (0, 0);
            self.due.pop_front();
            self.received += 1;
            if self.due.is_empty() {
                return Ok(());
            }
        }
    }

    /// How many bytes arrived; `None` if there are no more at present.
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

    /// Where the bytes behind the header belong; `None` if there are none or they must wait.
    fn expected(&mut self, call: Call) -> Result<Option<Span>> {
        let peer = self.connection.peer();
        let lost = || call.error(format!("{peer} sent what is no frame"));
        let (length, tag, name) = match Frame::decode(&self.header).ok_or_else(lost)? {
            Frame::Piece { length, tag, name } => (length, tag, name),
            Frame::Goodbye => {
                (self.has_left, self.arrived) = (true, (0, 0));
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
