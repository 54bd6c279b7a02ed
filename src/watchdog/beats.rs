//! Beats: small datagrams beside all collectives, from every rank to rank 0, which answers with
//! where the others stand.
//!
//! Rank 0 hears all, because a beat a second from a thousand ranks is little for one socket. A lost
//! datagram costs nothing: the next one says it all again. A datagram that does not carry the run's
//! token is somebody else's and is dropped.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::phase::Phase;
use crate::pulse::{self, Pulse};

/// Ranks that an answer names at most, those that are furthest behind first: it must fit into one
/// datagram.
const NAMED: usize = 12;

/// Largest datagram that is read.
const LARGEST: usize = 4096;

/// Where rank 0 hears beats, and by what it knows them.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Meeting {
    host: String,
    addresses: Vec<IpAddr>,
    port: u16,
    token: u64,
    /// Port of the desk that gives the word; 0 before it is open.
    pub desk: u16,
}

impl Meeting {
    /// By which rank 0 knows who is of its run.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Addresses at which the desk may be reached.
    pub fn desks(&self) -> Vec<SocketAddr> {
        self.addresses_at(self.desk)
    }

    /// Addresses of rank 0 that this process may reach, each once.
    fn addresses_at(&self, port: u16) -> Vec<SocketAddr> {
        let named = (self.host.as_str(), port)
            .to_socket_addrs()
            .into_iter()
            .flatten()
            .filter(SocketAddr::is_ipv4);
        let numbered = self.addresses.iter().map(|address| SocketAddr::new(*address, port));
        let mut all: Vec<SocketAddr> = numbered.chain(named).collect();
        if self.host != pulse::host() {
            // Its own loopback is not ours.
            all.retain(|address| !address.ip().is_loopback());
        }
        all.sort();
        all.dedup();
        all
    }
}

/// Where a rank stood when it was last heard of.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    pub rank: usize,
    pub host: String,
    pub pulse: Pulse,
    /// Time since its last beat.
    pub silence: Duration,
    /// The file that it waits for, if it waits for data.
    pub reading: Option<String>,
}

/// What is known of the others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Roll {
    /// Ranks that are furthest behind, at rank 0 all that were heard of.
    pub standings: Vec<Standing>,
    /// Ranks never heard of.
    pub unknown: Vec<usize>,
    /// Time since any rank moved.
    pub still: Option<Duration>,
    /// Time since rank 0 answered; zero on rank 0.
    pub silence: Duration,
    /// Rank 0's machine.
    pub hub_host: String,
}

#[derive(Deserialize, Serialize)]
struct Beat {
    token: u64,
    rank: usize,
    host: String,
    moment: Moment,
}

/// A pulse on its way; times in milliseconds.
#[derive(Clone, Deserialize, Serialize)]
struct Moment {
    step: u64,
    phase: u8,
    collectives: u64,
    age: u64,
    reading: Option<String>,
}

#[derive(Deserialize, Serialize)]
struct Answer {
    token: u64,
    /// `(rank, host, moment, silence)`.
    behind: Vec<(usize, String, Moment, u64)>,
    unknown: Vec<usize>,
    still: Option<u64>,
}

impl Moment {
    fn new(pulse: &Pulse, reading: Option<String>) -> Self {
        let Pulse { step, phase, collectives, age } = *pulse;
        Moment { step, phase: phase as u8, collectives, age: age.as_millis() as u64, reading }
    }

    /// This process's own.
    fn own(now: &Pulse) -> Self {
        Moment::new(now, reading(now))
    }

    /// `None` for a phase that this program does not know.
    fn standing(
        &self,
        rank: usize,
        host: &str,
        silence: Duration,
        since: Duration,
    ) -> Option<Standing> {
        let age = Duration::from_millis(self.age) + since;
        let pulse = Pulse {
            step: self.step,
            phase: Phase::numbered(self.phase)?,
            collectives: self.collectives,
            age,
        };
        Some(Standing { rank, host: host.into(), pulse, silence, reading: self.reading.clone() })
    }
}

/// The file that this process waits for.
pub fn reading(now: &Pulse) -> Option<String> {
    pulse::reading().filter(|_| now.phase == Phase::Data)
}

/// One end of the line between a rank and rank 0.
pub enum Line {
    Hub(Hub),
    Spoke(Spoke),
}

impl Line {
    /// Rank 0's end, with where the others meet it.
    ///
    /// # Errors
    /// [`Error::Environment`] if no socket can be opened.
    pub fn hub(world_size: usize, token: u64) -> Result<(Self, Meeting)> {
        let socket = open()?;
        let port = socket.local_addr().map_err(cannot_open)?.port();
        let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
        let addresses =
            interfaces.iter().map(if_addrs::Interface::ip).filter(IpAddr::is_ipv4).collect();
        let meeting = Meeting { host: pulse::host(), addresses, port, token, desk: 0 };
        Ok((Line::Hub(Hub { socket, token, world_size, heard: BTreeMap::new() }), meeting))
    }

    /// Another rank's end. Which of rank 0's addresses it can reach shows by the answers.
    ///
    /// # Errors
    /// As [`Line::hub`].
    pub fn spoke(meeting: &Meeting) -> Result<Self> {
        let hubs = meeting.addresses_at(meeting.port);
        let answered = Instant::now();
        let last = Roll { hub_host: meeting.host.clone(), ..Roll::default() };
        Ok(Line::Spoke(Spoke {
            socket: open()?,
            token: meeting.token,
            hubs,
            chosen: None,
            answered,
            last,
        }))
    }

    /// Tells where this rank stands and takes in what has come since; never waits.
    pub fn beat(&mut self, now: &Pulse) -> Roll {
        match self {
            Line::Hub(hub) => hub.beat(now),
            Line::Spoke(spoke) => spoke.beat(now),
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

/// Everything that has arrived and reads as a `T`, with who sent it.
fn arrived<T: for<'d> Deserialize<'d>>(socket: &UdpSocket) -> Vec<(T, SocketAddr)> {
    let mut buffer = [0; LARGEST];
    let mut all = Vec::new();
    // An error that is not "nothing there" is the echo of a datagram that nobody took: as good as
    // nothing.
    while let Ok((bytes, sender)) = socket.recv_from(&mut buffer) {
        all.extend(serde_json::from_slice(&buffer[..bytes]).ok().map(|message| (message, sender)));
    }
    all
}

fn send(socket: &UdpSocket, message: &impl Serialize, to: SocketAddr) {
    let bytes = serde_json::to_vec(message).expect("numbers and texts are JSON");
    // What cannot be sent now is said again by the next beat.
    let _ = socket.send_to(&bytes, to);
}

pub struct Hub {
    socket: UdpSocket,
    token: u64,
    world_size: usize,
    /// Host, moment, and when it came.
    heard: BTreeMap<usize, (String, Moment, Instant)>,
}

impl Hub {
    fn beat(&mut self, now: &Pulse) -> Roll {
        let mut callers = Vec::new();
        for (beat, sender) in arrived::<Beat>(&self.socket) {
            if beat.token == self.token && beat.rank < self.world_size {
                self.heard.insert(beat.rank, (beat.host, beat.moment, Instant::now()));
                callers.push(sender);
            }
        }
        self.heard.insert(0, (pulse::host(), Moment::own(now), Instant::now()));
        let roll = self.roll();
        let answer = self.answer(&roll);
        callers.into_iter().for_each(|caller| send(&self.socket, &answer, caller));
        roll
    }

    fn roll(&self) -> Roll {
        let standing = |(rank, (host, moment, when)): (&usize, &(String, Moment, Instant))| {
            let silence = when.elapsed();
            moment.standing(*rank, host, silence, silence)
        };
        let standings: Vec<Standing> = self.heard.iter().filter_map(standing).collect();
        let still = standings.iter().map(|standing| standing.pulse.age).min();
        let unknown = (0..self.world_size).filter(|rank| !self.heard.contains_key(rank)).collect();
        Roll { standings, unknown, still, silence: Duration::ZERO, hub_host: pulse::host() }
    }

    fn answer(&self, roll: &Roll) -> Answer {
        let mut behind: Vec<&Standing> = roll.standings.iter().collect();
        behind.sort_by_key(|standing| (standing.pulse.step, standing.pulse.collectives));
        // One that is in front too, so that who is behind can be told.
        let front = behind.split_off(behind.len().saturating_sub(1));
        let named = behind.into_iter().take(NAMED).chain(front);
        let entry = |standing: &Standing| {
            let moment = Moment::new(&standing.pulse, standing.reading.clone());
            (standing.rank, standing.host.clone(), moment, standing.silence.as_millis() as u64)
        };
        Answer {
            token: self.token,
            behind: named.map(entry).collect(),
            unknown: roll.unknown.iter().take(NAMED).copied().collect(),
            still: roll.still.map(|still| still.as_millis() as u64),
        }
    }
}

pub struct Spoke {
    socket: UdpSocket,
    token: u64,
    hubs: Vec<SocketAddr>,
    /// The address that answers.
    chosen: Option<SocketAddr>,
    answered: Instant,
    last: Roll,
}

impl Spoke {
    /// Silence after which every address is tried again.
    const LOST: Duration = Duration::from_secs(5);

    fn beat(&mut self, now: &Pulse) -> Roll {
        for (answer, sender) in arrived::<Answer>(&self.socket) {
            if answer.token == self.token {
                (self.chosen, self.answered) = (Some(sender), Instant::now());
                self.last =
                    Roll { hub_host: std::mem::take(&mut self.last.hub_host), ..read(answer) };
            }
        }
        let silence = self.answered.elapsed();
        if silence > Self::LOST {
            self.chosen = None;
        }
        let beat = Beat {
            token: self.token,
            rank: pulse::place().0,
            host: pulse::host(),
            moment: Moment::own(now),
        };
        let all = if self.chosen.is_some() { &[][..] } else { &self.hubs[..] };
        self.chosen.iter().chain(all).for_each(|hub| send(&self.socket, &beat, *hub));
        Roll { still: self.last.still.map(|still| still + silence), silence, ..self.last.clone() }
    }
}

fn read(answer: Answer) -> Roll {
    let standing = |(rank, host, moment, silence): &(usize, String, Moment, u64)| {
        moment.standing(*rank, host, Duration::from_millis(*silence), Duration::ZERO)
    };
    Roll {
        standings: answer.behind.iter().filter_map(standing).collect(),
        unknown: answer.unknown,
        still: answer.still.map(Duration::from_millis),
        ..Roll::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_know_the_runs_token_or_is_no_rank_of_it_is_not_heard() {
        let Ok((Line::Hub(mut hub), meeting)) = Line::hub(3, 7) else { panic!("no socket") };
        let (stranger, address) =
            (open().expect("a socket"), SocketAddr::from((Ipv4Addr::LOCALHOST, meeting.port)));
        let now = Pulse { step: 4, phase: Phase::Reduce, collectives: 1, age: Duration::ZERO };
        let beat = |token, rank| {
            send(
                &stranger,
                &Beat { token, rank, host: "h".into(), moment: Moment::own(&now) },
                address,
            )
        };
        beat(8, 1);
        beat(7, 3);
        // What is sent over the loopback comes in order, so the first two have been met when the
        // last one has.
        beat(7, 2);
        let began = Instant::now();
        while !hub.heard.contains_key(&2) {
            assert!(began.elapsed() < Duration::from_secs(30), "nothing is heard");
            hub.beat(&now);
        }
        assert_eq!(hub.heard.keys().copied().collect::<Vec<_>>(), [0, 2]);
    }
}
