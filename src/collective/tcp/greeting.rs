//! How each pair of ranks is connected once: the higher rank calls, shows the world's token, and
//! the lower one shows it back.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::exchange::Place;
use super::line::Line;
use super::record::{Caller, Heard, SHORT_BYTES, say, wait_until};
use super::rendezvous::{CALL, Company, ignore, patience};
use crate::error::{Error, Result, one_line};

/// Before a rank that could be reached at none of its addresses is tried again.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Deserialize, Serialize)]
struct Greeting {
    token: String,
    from: usize,
    to: usize,
}

/// A rank that this one calls.
struct Call {
    to: usize,
    /// Where it may be; tried in turn.
    addresses: VecDeque<SocketAddr>,
    /// Connected, and not yet answered.
    caller: Option<Caller>,
    /// What the last attempt came to.
    why: String,
}

struct Party<'c> {
    place: Place,
    company: &'c Company,
    door: &'c TcpListener,
    /// Who is connected, by rank.
    sockets: Vec<Option<TcpStream>>,
    calls: Vec<Call>,
    callers: Vec<Caller>,
}

/// Connects this rank with all others.
pub fn greet_all(
    place: Place,
    company: &Company,
    door: &TcpListener,
    limit: Duration,
) -> Result<Vec<Line>> {
    let until = Instant::now() + limit;
    let calls = (0..place.rank).map(|to| Call {
        to,
        addresses: VecDeque::new(),
        caller: None,
        why: "no address".into(),
    });
    let sockets = (0..place.world_size).map(|_| None).collect();
    let mut party =
        Party { place, company, door, sockets, calls: calls.collect(), callers: Vec::new() };
    party.gather(until, limit)?;
    party
        .callers
        .iter()
        .for_each(|caller| ignore(caller, "it says nothing, and all ranks are connected"));
    let sockets =
        party.sockets.into_iter().enumerate().filter_map(|(rank, socket)| Some((rank, socket?)));
    let line = |(rank, socket)| Line::new(rank, one_line(&company.seats[rank].host), socket);
    sockets
        .map(line)
        .collect::<std::io::Result<_>>()
        .map_err(|error| CALL.error(format!("cannot set a connection up: {error}")))
}

impl Party<'_> {
    fn gather(&mut self, until: Instant, limit: Duration) -> Result<()> {
        loop {
            self.call(until);
            self.hear_answers();
            if self.place.peers().all(|peer| self.sockets[peer].is_some()) {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(self.incomplete(limit));
            }
            let turn = if self.calls.iter().any(|call| call.caller.is_none()) {
                Instant::now() + PAUSE
            } else {
                until
            };
            let waiting =
                self.calls.iter().filter_map(|call| call.caller.as_ref()).chain(&self.callers);
            let sockets = waiting.map(|caller| caller.socket.as_fd()).chain([self.door.as_fd()]);
            let failed =
                |error: std::io::Error| CALL.error(format!("cannot connect the ranks: {error}"));
            wait_until(turn.min(until), sockets).map_err(failed)?;
            self.callers.extend(Caller::all_at(self.door).map_err(failed)?);
            self.hear_callers();
        }
    }

    /// Tries the next address of each rank to which no connection stands.
    fn call(&mut self, until: Instant) {
        let (own, company) = (self.place.rank, self.company);
        for call in self.calls.iter_mut().filter(|call| call.caller.is_none()) {
            if call.addresses.is_empty() {
                call.addresses = addresses(company, own, call.to);
            }
            while let (None, Some(address)) = (&call.caller, call.addresses.pop_front()) {
                let greeting = Greeting { token: company.token.clone(), from: own, to: call.to };
                let connected = TcpStream::connect_timeout(&address, patience(until));
                let called = connected.and_then(|socket| {
                    say(&socket, &greeting).and_then(|()| Caller::new(socket, address))
                });
                match called {
                    Ok(caller) => call.caller = Some(caller),
                    Err(error) => call.why = format!("{address}: {error}"),
                }
            }
        }
    }

    fn hear_answers(&mut self) {
        for call in &mut self.calls {
            let Some(mut caller) = call.caller.take() else { continue };
            let address = caller.address;
            match caller.hear::<Greeting>(SHORT_BYTES) {
                Heard::Nothing => call.caller = Some(caller),
                Heard::Record(greeting)
                    if greeting.token == self.company.token && greeting.from == call.to =>
                {
                    self.sockets[call.to] = Some(caller.socket);
                }
                Heard::Record(_) => call.why = format!("{address}: another process answers"),
                Heard::Stranger(why) => call.why = format!("{address}: {why}"),
            }
        }
        self.calls.retain(|call| self.sockets[call.to].is_none());
    }

    fn hear_callers(&mut self) {
        for mut caller in std::mem::take(&mut self.callers) {
            match caller.hear::<Greeting>(SHORT_BYTES) {
                Heard::Nothing => self.callers.push(caller),
                Heard::Record(greeting) => self.admit(caller, &greeting),
                Heard::Stranger(why) => ignore(&caller, &why),
            }
        }
    }

    fn admit(&mut self, caller: Caller, greeting: &Greeting) {
        let Place { rank, world_size } = self.place;
        let is_ours = greeting.token == self.company.token
            && greeting.to == rank
            && (rank + 1..world_size).contains(&greeting.from);
        if !is_ours || self.sockets[greeting.from].is_some() {
            return ignore(&caller, "it is no rank that is to connect with this one");
        }
        let answer = Greeting { token: self.company.token.clone(), from: rank, to: greeting.from };
        match say(&caller.socket, &answer) {
            Ok(()) => self.sockets[greeting.from] = Some(caller.socket),
            Err(error) => ignore(&caller, &error.to_string()),
        }
    }

    fn incomplete(&self, limit: Duration) -> Error {
        let missing: Vec<usize> =
            self.place.peers().filter(|peer| self.sockets[*peer].is_none()).collect();
        let name = |rank: &usize| {
            format!("rank {rank} (host {})", one_line(&self.company.seats[*rank].host))
        };
        let names = missing.iter().map(name).collect::<Vec<_>>().join(", ");
        let reasons: Vec<&str> = self.calls.iter().map(|call| call.why.as_str()).collect();
        let (seconds, reasons) = (limit.as_secs_f64(), reasons.join("; "));
        CALL.error(format!(
            "rank {} has no connection with {names} after {seconds} s: {reasons}",
            self.place.rank
        ))
    }
}

/// Where rank `to` may be reached from rank `own`, the most likely ones first. Loopback addresses
/// are every host's own.
fn addresses(company: &Company, own: usize, to: usize) -> VecDeque<SocketAddr> {
    let (here, there, root) = (&company.seats[own], &company.seats[to], &company.seats[0]);
    let is_neighbour = here.host == there.host;
    let mut found: Vec<IpAddr> = Vec::new();
    if is_neighbour {
        found.push(Ipv4Addr::LOCALHOST.into());
    }
    if there.host == root.host {
        found.extend(company.root);
    }
    found.extend(&there.addresses);
    // The last resort asks a name server, which may take its time.
    let named = || {
        (there.host.as_str(), 0).to_socket_addrs().into_iter().flatten().map(|address| address.ip())
    };
    found.retain(|address| is_neighbour || !address.to_canonical().is_loopback());
    if found.is_empty() {
        found.extend(named().filter(|address| !address.is_loopback()));
    }
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in found.into_iter().map(|ip| SocketAddr::new(ip.to_canonical(), there.port)) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses.into()
}
