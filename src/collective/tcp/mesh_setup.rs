//! Connects each pair of ranks once: the higher rank dials and sends the world's token, and the
//! lower one sends it back.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::exchange::Membership;
use super::connection::Connection;
use super::roster::{CALL, Roster, attempt_timeout, ignore};
use super::setup_message::{Incoming, Received, SHORT_BYTES, send_record, wait_until};
use crate::error::{Error, Result, one_line};

/// Pause before a rank that no address reached is dialled again.
const PAUSE: Duration = Duration::from_millis(100);

/// Record with which two ranks recognize each other on a new connection.
#[derive(Deserialize, Serialize)]
struct Hello {
    token: String,
    from: usize,
    to: usize,
}

/// A rank that this one dials.
struct Dial {
    to: usize,
    /// Addresses that have not been tried in this round.
    addresses: VecDeque<SocketAddr>,
    /// The connection that was made and has not been answered yet.
    incoming: Option<Incoming>,
    /// The reason why the last attempt failed, for the error message.
    why: String,
}

/// The connections of this rank that are complete, and those that are being made.
struct MeshSetup<'c> {
    membership: Membership,
    roster: &'c Roster,
    listener: &'c TcpListener,
    /// Complete connections, by rank.
    sockets: Vec<Option<TcpStream>>,
    dials: Vec<Dial>,
    incoming: Vec<Incoming>,
}

/// Connects this rank with all others.
pub fn connect_all(
    membership: Membership,
    roster: &Roster,
    listener: &TcpListener,
    limit: Duration,
) -> Result<Vec<Connection>> {
    let until = Instant::now() + limit;
    let dials = (0..membership.rank).map(|to| Dial {
        to,
        addresses: VecDeque::new(),
        incoming: None,
        why: "no address".into(),
    });
    let sockets = (0..membership.world_size).map(|_| None).collect();
    let mut setup = MeshSetup {
        membership,
        roster,
        listener,
        sockets,
        dials: dials.collect(),
        incoming: Vec::new(),
    };
    setup.gather(until, limit)?;
    setup
        .incoming
        .iter()
        .for_each(|incoming| ignore(incoming, "it says nothing, and all ranks are connected"));
    let sockets =
        setup.sockets.into_iter().enumerate().filter_map(|(rank, socket)| Some((rank, socket?)));
    let connection =
        |(rank, socket)| Connection::new(rank, one_line(&roster.endpoints[rank].host), socket);
    sockets
        .map(connection)
        .collect::<std::io::Result<_>>()
        .map_err(|error| CALL.error(format!("cannot set a connection up: {error}")))
}

impl MeshSetup<'_> {
    fn gather(&mut self, until: Instant, limit: Duration) -> Result<()> {
        loop {
            self.dial(until);
            self.read_replies();
            if self.membership.peers().all(|peer| self.sockets[peer].is_some()) {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(self.incomplete(limit));
            }
            let turn = if self.dials.iter().any(|dial| dial.incoming.is_none()) {
                Instant::now() + PAUSE
            } else {
                until
            };
            let waiting =
                self.dials.iter().filter_map(|dial| dial.incoming.as_ref()).chain(&self.incoming);
            let sockets =
                waiting.map(|incoming| incoming.socket.as_fd()).chain([self.listener.as_fd()]);
            let failed =
                |error: std::io::Error| CALL.error(format!("cannot connect the ranks: {error}"));
            wait_until(turn.min(until), sockets).map_err(failed)?;
            self.incoming.extend(Incoming::accept_all(self.listener).map_err(failed)?);
            self.read_hellos();
        }
    }

    /// Dials the ranks to which there is no connection, one address after another.
    fn dial(&mut self, until: Instant) {
        let (own, roster) = (self.membership.rank, self.roster);
        for dial in self.dials.iter_mut().filter(|dial| dial.incoming.is_none()) {
            if dial.addresses.is_empty() {
                dial.addresses = addresses(roster, own, dial.to);
            }
            while let (None, Some(address)) = (&dial.incoming, dial.addresses.pop_front()) {
                let hello = Hello { token: roster.token.clone(), from: own, to: dial.to };
                let connected = TcpStream::connect_timeout(&address, attempt_timeout(until));
                let greeted = connected.and_then(|socket| {
                    send_record(&socket, &hello).and_then(|()| Incoming::new(socket, address))
                });
                match greeted {
                    Ok(incoming) => dial.incoming = Some(incoming),
                    Err(error) => dial.why = format!("{address}: {error}"),
                }
            }
        }
    }

    fn read_replies(&mut self) {
        for dial in &mut self.dials {
            let Some(mut incoming) = dial.incoming.take() else { continue };
            let address = incoming.address;
            match incoming.receive::<Hello>(SHORT_BYTES) {
                Received::Partial => dial.incoming = Some(incoming),
                Received::Message(hello)
                    if hello.token == self.roster.token && hello.from == dial.to =>
                {
                    self.sockets[dial.to] = Some(incoming.socket);
                }
                Received::Message(_) => dial.why = format!("{address}: another process answers"),
                Received::Stranger(why) => dial.why = format!("{address}: {why}"),
            }
        }
        self.dials.retain(|dial| self.sockets[dial.to].is_none());
    }

    fn read_hellos(&mut self) {
        for mut incoming in std::mem::take(&mut self.incoming) {
            match incoming.receive::<Hello>(SHORT_BYTES) {
                Received::Partial => self.incoming.push(incoming),
                Received::Message(hello) => self.admit(incoming, &hello),
                Received::Stranger(why) => ignore(&incoming, &why),
            }
        }
    }

    fn admit(&mut self, incoming: Incoming, hello: &Hello) {
        let Membership { rank, world_size } = self.membership;
        let is_ours = hello.token == self.roster.token
            && hello.to == rank
            && (rank + 1..world_size).contains(&hello.from);
        if !is_ours || self.sockets[hello.from].is_some() {
            return ignore(&incoming, "it is no rank that is to connect with this one");
        }
        let answer = Hello { token: self.roster.token.clone(), from: rank, to: hello.from };
        match send_record(&incoming.socket, &answer) {
            Ok(()) => self.sockets[hello.from] = Some(incoming.socket),
            Err(error) => ignore(&incoming, &error.to_string()),
        }
    }

    fn incomplete(&self, limit: Duration) -> Error {
        let missing: Vec<usize> =
            self.membership.peers().filter(|peer| self.sockets[*peer].is_none()).collect();
        let name = |rank: &usize| {
            format!("rank {rank} (host {})", one_line(&self.roster.endpoints[*rank].host))
        };
        let names = missing.iter().map(name).collect::<Vec<_>>().join(", ");
        let reasons: Vec<&str> = self.dials.iter().map(|dial| dial.why.as_str()).collect();
        let (seconds, reasons) = (limit.as_secs_f64(), reasons.join("; "));
        CALL.error(format!(
            "rank {} has no connection with {names} after {seconds} s: {reasons}",
            self.membership.rank
        ))
    }
}

/// Returns the addresses at which rank `own` may reach rank `to`, the most likely ones first.
/// Loopback addresses count only on the same host.
fn addresses(roster: &Roster, own: usize, to: usize) -> VecDeque<SocketAddr> {
    let endpoints = &roster.endpoints;
    let (source, target, root) = (&endpoints[own], &endpoints[to], &endpoints[0]);
    let is_neighbour = source.host == target.host;
    let mut found: Vec<IpAddr> = Vec::new();
    if is_neighbour {
        found.push(Ipv4Addr::LOCALHOST.into());
    }
    if target.host == root.host {
        found.extend(roster.root);
    }
    found.extend(&target.addresses);
    // The last resort is name resolution, which may be slow.
    let resolve = || {
        (target.host.as_str(), 0)
            .to_socket_addrs()
            .into_iter()
            .flatten()
            .map(|address| address.ip())
    };
    found.retain(|address| is_neighbour || !address.to_canonical().is_loopback());
    if found.is_empty() {
        found.extend(resolve().filter(|address| !address.is_loopback()));
    }
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in found.into_iter().map(|ip| SocketAddr::new(ip.to_canonical(), target.port)) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses.into()
}
