//! Beats: small datagrams, outside of any collective, from every rank to rank 0, which answers with
//! the state of the others.
//!
//! One socket on rank 0 is enough for a beat a second from a thousand ranks. Lost datagrams do no
//! harm, because the next one repeats everything. Datagrams without the run's token are dropped.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::phase::Phase;
use crate::pulse::{self, Pulse};

/// Most ranks in an answer, those furthest behind first: it must fit into one datagram.
const NAMED: usize = 12;

/// Most bytes that are sent of the path of a file, its end: with this an entry of an answer takes
/// below 300.
const PATH: usize = 96;

/// Largest datagram that is received.
const LARGEST: usize = 4096;

/// The address at which rank 0 receives beats, and the token of the run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct HubAddress {
    host: String,
    addresses: Vec<IpAddr>,
    port: u16,
    token: u64,
    /// Port of rank 0's arbiter; 0 before it is open.
    pub arbiter_port: u16,
}

impl HubAddress {
    /// The token by which rank 0 recognizes datagrams of its run.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Addresses at which the arbiter may be reached.
    pub fn arbiter_addresses(&self) -> Vec<SocketAddr> {
        self.addresses_at(self.arbiter_port)
    }

    /// Addresses at which this process may reach rank 0, without duplicates.
    fn addresses_at(&self, port: u16) -> Vec<SocketAddr> {
        let named = (self.host.as_str(), port)
            .to_socket_addrs()
            .into_iter()
            .flatten()
            .filter(SocketAddr::is_ipv4);
        let numbered = self.addresses.iter().map(|address| SocketAddr::new(*address, port));
        let mut all: Vec<SocketAddr> = numbered.chain(named).collect();
        if self.host != pulse::host() {
            // Rank 0's loopback address is not valid on another host.
            all.retain(|address| !address.ip().is_loopback());
        }
        all.sort();
        all.dedup();
        all
    }
}

/// The last known state of a rank.
#[derive(Clone, Debug, PartialEq)]
pub struct RankState {
    pub rank: usize,
    pub host: String,
    pub pulse: Pulse,
    /// Time since its last beat.
    pub silence: Duration,
    /// The file that it waits for, if it waits for data.
    pub reading: Option<String>,
}

/// The states of the other ranks, as far as this rank knows them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overview {
    /// On rank 0 all ranks that have sent a beat; on other ranks those furthest behind, and one of
    /// the most advanced.
    pub states: Vec<RankState>,
    /// Ranks that have never sent a beat.
    pub unknown: Vec<usize>,
    /// Time since any rank made progress; `None` if it is unknown.
    pub still: Option<Duration>,
    /// Time since rank 0 last answered; zero on rank 0.
    pub silence: Duration,
    /// Rank 0's host name.
    pub hub_host: String,
}

#[derive(Deserialize, Serialize)]
struct Beat {
    token: u64,
    rank: usize,
    host: String,
    moment: Moment,
}

/// A pulse as it is sent; times in milliseconds.
#[derive(Clone, Deserialize, Serialize)]
struct Moment {
    step: u64,
    phase: u8,
    stage: Option<usize>,
    collectives: u64,
    age: u64,
    reading: Option<String>,
}

#[derive(Deserialize, Serialize)]
struct Answer {
    token: u64,
    /// Rank, host, moment and silence in milliseconds.
    behind: Vec<(usize, String, Moment, u64)>,
    unknown: Vec<usize>,
    still: Option<u64>,
}

impl Moment {
    fn new(pulse: &Pulse, reading: Option<String>) -> Self {
        let Pulse { step, phase, stage, collectives, age } = *pulse;
        let (phase, age) = (phase as u8, age.as_millis() as u64);
        Moment { step, phase, stage, collectives, age, reading: reading.map(|path| end_of(&path)) }
    }

    /// The state of this process.
    fn own(now: &Pulse) -> Self {
        Moment::new(now, reading(now))
    }

    /// Converts to a state; `None` for a phase that this program does not know.
    fn state(
        &self,
        rank: usize,
        host: &str,
        silence: Duration,
        since: Duration,
    ) -> Option<RankState> {
        let age = Duration::from_millis(self.age) + since;
        let pulse = Pulse {
            step: self.step,
            phase: Phase::numbered(self.phase)?,
            stage: self.stage,
            collectives: self.collectives,
            age,
        };
        Some(RankState { rank, host: host.into(), pulse, silence, reading: self.reading.clone() })
    }
}

/// The end of a path, of at most [`PATH`] bytes and a mark of what is left out.
fn end_of(path: &str) -> String {
    if path.len() <= PATH {
        return path.into();
    }
    let begin = (path.len() - PATH..path.len()).find(|place| path.is_char_boundary(*place));
    format!("…{}", &path[begin.unwrap_or(path.len())..])
}

/// The file that this process waits for; `None` outside of phase `data`.
pub fn reading(now: &Pulse) -> Option<String> {
    pulse::reading().filter(|_| now.phase == Phase::Data)
}

/// One rank's side of the beats: rank 0 is the hub, all others are spokes.
pub enum Heartbeat {
    Hub(Hub),
    Spoke(Spoke),
}

impl Heartbeat {
    /// Opens rank 0's side; also returns its address for the others.
    ///
    /// # Errors
    /// [`Error::Environment`] if no socket can be opened.
    pub fn hub(world_size: usize, token: u64) -> Result<(Self, HubAddress)> {
        let socket = open()?;
        let port = socket.local_addr().map_err(cannot_open)?.port();
        let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
        let addresses =
            interfaces.iter().map(if_addrs::Interface::ip).filter(IpAddr::is_ipv4).collect();
        let address = HubAddress { host: pulse::host(), addresses, port, token, arbiter_port: 0 };
        Ok((Heartbeat::Hub(Hub { socket, token, world_size, heard: BTreeMap::new() }), address))
    }

    /// Opens another rank's side. It sends to all addresses of rank 0 until one of them answers.
    ///
    /// # Errors
    /// As [`Heartbeat::hub`].
    pub fn spoke(address: &HubAddress) -> Result<Self> {
        let hubs = address.addresses_at(address.port);
        let answered = Instant::now();
        let last = Overview { hub_host: address.host.clone(), ..Overview::default() };
        Ok(Heartbeat::Spoke(Spoke {
            socket: open()?,
            token: address.token,
            hubs,
            chosen: None,
            answered,
            last,
        }))
    }

    /// Sends this rank's state and receives the datagrams that have arrived since; never blocks.
    pub fn beat(&mut self, now: &Pulse) -> Overview {
        match self {
            Heartbeat::Hub(hub) => hub.beat(now),
            Heartbeat::Spoke(spoke) => spoke.beat(now),
        }
    }
}

fn open() -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(cannot_open)?;
    socket.set_nonblocking(true).map_err(cannot_open)?;
    Ok(socket)
}

pub fn cannot_open(error: std::io::Error) -> Error {
    Error::environment(format!("the watchdog cannot open a socket: {error}"))
}

/// Receives all datagrams that have arrived and parse as a `T`, with their senders.
fn receive_all<T: for<'d> Deserialize<'d>>(socket: &UdpSocket) -> Vec<(T, SocketAddr)> {
    let mut buffer = [0; LARGEST];
    let mut all = Vec::new();
    // Also ends at an error other than "would block": it reports an earlier datagram that was not
    // delivered.
    while let Ok((bytes, sender)) = socket.recv_from(&mut buffer) {
        all.extend(serde_json::from_slice(&buffer[..bytes]).ok().map(|message| (message, sender)));
    }
    all
}

fn send(socket: &UdpSocket, message: &impl Serialize, to: SocketAddr) {
    let bytes = serde_json::to_vec(message).expect("numbers and texts are JSON");
    // A datagram that cannot be sent now is repeated by the next beat.
    let _ = socket.send_to(&bytes, to);
}

/// Rank 0's side.
pub struct Hub {
    socket: UdpSocket,
    token: u64,
    world_size: usize,
    /// Host, moment, and time of receipt of each rank's last beat.
    heard: BTreeMap<usize, (String, Moment, Instant)>,
}

impl Hub {
    fn beat(&mut self, now: &Pulse) -> Overview {
        let mut senders = Vec::new();
        for (beat, sender) in receive_all::<Beat>(&self.socket) {
            if beat.token == self.token && beat.rank < self.world_size {
                self.heard.insert(beat.rank, (beat.host, beat.moment, Instant::now()));
                senders.push(sender);
            }
        }
        self.heard.insert(0, (pulse::host(), Moment::own(now), Instant::now()));
        let overview = self.overview();
        let answer = self.answer(&overview);
        senders.into_iter().for_each(|sender| send(&self.socket, &answer, sender));
        overview
    }

    fn overview(&self) -> Overview {
        let state = |(rank, (host, moment, when)): (&usize, &(String, Moment, Instant))| {
            let silence = when.elapsed();
            moment.state(*rank, host, silence, silence)
        };
        let states: Vec<RankState> = self.heard.iter().filter_map(state).collect();
        let still = states.iter().map(|state| state.pulse.age).min();
        let unknown = (0..self.world_size).filter(|rank| !self.heard.contains_key(rank)).collect();
        Overview { states, unknown, still, silence: Duration::ZERO, hub_host: pulse::host() }
    }

    fn answer(&self, overview: &Overview) -> Answer {
        let mut behind: Vec<&RankState> = overview.states.iter().collect();
        behind.sort_by_key(|state| (state.pulse.step, state.pulse.collectives));
        // Includes one of the most advanced ranks, so that receivers can tell which ranks are
        // behind.
        let front = behind.split_off(behind.len().saturating_sub(1));
        let named = behind.into_iter().take(NAMED).chain(front);
        let entry = |state: &RankState| {
            let moment = Moment::new(&state.pulse, state.reading.clone());
            (state.rank, state.host.clone(), moment, state.silence.as_millis() as u64)
        };
        Answer {
            token: self.token,
            behind: named.map(entry).collect(),
            unknown: overview.unknown.iter().take(NAMED).copied().collect(),
            still: overview.still.map(|still| still.as_millis() as u64),
        }
    }
}

/// Any other rank's side.
pub struct Spoke {
    socket: UdpSocket,
    token: u64,
    hubs: Vec<SocketAddr>,
    /// The address that has answered; `None` while all are tried.
    chosen: Option<SocketAddr>,
    answered: Instant,
    last: Overview,
}

impl Spoke {
    /// Silence after which every address is tried again.
    const LOST: Duration = Duration::from_secs(5);

    fn beat(&mut self, now: &Pulse) -> Overview {
        for (answer, sender) in receive_all::<Answer>(&self.socket) {
            if answer.token == self.token {
                (self.chosen, self.answered) = (Some(sender), Instant::now());
                self.last =
                    Overview { hub_host: std::mem::take(&mut self.last.hub_host), ..read(answer) };
            }
        }
        let silence = self.answered.elapsed();
        if silence > Self::LOST {
            self.chosen = None;
        }
        let beat = Beat {
            token: self.token,
            rank: pulse::rank(),
            host: pulse::host(),
            moment: Moment::own(now),
        };
        let all = if self.chosen.is_some() { &[][..] } else { &self.hubs[..] };
        self.chosen.iter().chain(all).for_each(|hub| send(&self.socket, &beat, *hub));
        Overview {
            still: self.last.still.map(|still| still + silence),
            silence,
            ..self.last.clone()
        }
    }
}

fn read(answer: Answer) -> Overview {
    let state = |(rank, host, moment, silence): &(usize, String, Moment, u64)| {
        moment.state(*rank, host, Duration::from_millis(*silence), Duration::ZERO)
    };
    Overview {
        states: answer.behind.iter().filter_map(state).collect(),
        unknown: answer.unknown,
        still: answer.still.map(Duration::from_millis),
        ..Overview::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_know_the_runs_token_or_is_no_rank_of_it_is_not_heard() {
        let Ok((Heartbeat::Hub(mut hub), address)) = Heartbeat::hub(3, 7) else {
            panic!("no socket")
        };
        let (stranger, address) =
            (open().expect("a socket"), SocketAddr::from((Ipv4Addr::LOCALHOST, address.port)));
        let now = Pulse {
            step: 4,
            phase: Phase::Reduce,
            stage: None,
            collectives: 1,
            age: Duration::ZERO,
        };
        let beat = |token, rank| {
            send(
                &stranger,
                &Beat { token, rank, host: "h".into(), moment: Moment::own(&now) },
                address,
            )
        };
        beat(8, 1);
        beat(7, 3);
        // Loopback datagrams arrive in order, so the first two have been received when the last one
        // has.
        beat(7, 2);
        let began = Instant::now();
        while !hub.heard.contains_key(&2) {
            assert!(began.elapsed() < Duration::from_secs(30), "nothing is heard");
            hub.beat(&now);
        }
        assert_eq!(hub.heard.keys().copied().collect::<Vec<_>>(), [0, 2]);
    }
}
