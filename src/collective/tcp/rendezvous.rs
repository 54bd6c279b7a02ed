//! How ranks learn where the others are: all tell rank 0, and rank 0 tells all.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::super::call::Call;
use super::super::exchange::Place;
use super::greeting;
use super::line::Line;
use super::record::{Caller, Heard, SHORT_BYTES, say, wait_until};
use crate::error::{Error, Result, one_line};

pub const CALL: Call = Call { backend: "tcp", operation: "connect" };

/// Records of different builds need not fit together, and digests of operations do not.
const BUILD: &str = env!("CARGO_PKG_VERSION");

/// Longest attempt at one address.
pub const ATTEMPT: Duration = Duration::from_secs(3);
/// Between attempts, at first and at last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Rank 0 gives up by its own clock, which began later than this rank's connection at the latest;
/// then it says why.
const GRACE: Duration = Duration::from_secs(5);

/// Strangers that may stay for a while in silence; the oldest goes when there are more.
const SILENT_STRANGERS: usize = 64;

/// Where a rank can be reached.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Seat {
    pub host: String,
    pub addresses: Vec<IpAddr>,
    pub port: u16,
}

/// What a rank tells rank 0.
#[derive(Deserialize, Serialize)]
struct Hello {
    build: String,
    rank: usize,
    world_size: usize,
    seat: Seat,
}

/// What rank 0 tells a rank.
#[derive(Deserialize, Serialize)]
enum Answer {
    Welcome {
        /// Known to the ranks of this world only.
        token: String,
        seats: Vec<Seat>,
    },
    Refused {
        code: i32,
        what: String,
    },
}

/// All ranks' seats, as this rank knows them.
pub struct Company {
    pub token: String,
    pub seats: Vec<Seat>,
    /// Where this rank has reached rank 0.
    pub root: Option<IpAddr>,
}

/// A connection with every other rank; every rank calls it, and each step of it ends within
/// `limit`. `refusing`: called on rank 0 with the reason before it turns the others away.
pub fn meet(
    place: Place,
    rendezvous: &str,
    limit: Duration,
    refusing: &dyn Fn(&Error),
) -> Result<Vec<Line>> {
    let door = listen(None).map_err(|error| CALL.error(format!("cannot listen: {error}")))?;
    let port = door
        .local_addr()
        .map_err(|error| CALL.error(format!("no port to listen at: {error}")))?
        .port();
    let seat = Seat {
        host: gethostname::gethostname().to_string_lossy().into_owned(),
        addresses: Vec::new(),
        port,
    };
    let company = match place.rank {
        0 => receive(place, rendezvous, seat, limit, refusing)?,
        _ => register(place, rendezvous, seat, limit)?,
    };
    greeting::greet_all(place, &company, &door, limit)
}

/// Listens at this address, or at a port of the system's choice. At all addresses of the machine:
/// which of its own ones a host knows by its name is a matter of taste.
fn listen(at: Option<SocketAddr>) -> io::Result<TcpListener> {
    let port = at.map_or(0, |at| at.port());
    let door = match at.filter(|at| at.ip().is_loopback()) {
        Some(at) => TcpListener::bind(at),
        None => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))),
    }?;
    door.set_nonblocking(true)?;
    Ok(door)
}

/// Rank 0's desk.
struct Desk {
    place: Place,
    door: TcpListener,
    /// Who has come, by rank; rank 0 has no connection.
    guests: Vec<Option<(Seat, Option<Caller>)>>,
    callers: Vec<Caller>,
}

/// Rank 0's part: waits for all ranks, and answers them.
fn receive(
    place: Place,
    rendezvous: &str,
    seat: Seat,
    limit: Duration,
    refusing: &dyn Fn(&Error),
) -> Result<Company> {
    let until = Instant::now() + limit;
    let mut desk = Desk {
        place,
        door: open(rendezvous, until)?,
        guests: (0..place.world_size).map(|_| None).collect(),
        callers: Vec::new(),
    };
    desk.guests[0] = Some((seat, None));
    match desk.fill(until, limit) {
        Ok(()) => desk.welcome(),
        Err(error) => {
            refusing(&error);
            desk.answer(&Answer::Refused { code: error.exit_code(), what: error.to_string() });
            Err(error)
        }
    }
}

/// Listens at the rendezvous; a port that is taken may become free, e.g. when the job's last
/// attempt ends.
fn open(rendezvous: &str, until: Instant) -> Result<TcpListener> {
    loop {
        let why = match resolve(rendezvous).and_then(|addresses| listen(addresses.first().copied()))
        {
            Ok(door) => return Ok(door),
            Err(error) => error,
        };
        if Instant::now() + PAUSES.1 > until {
            return Err(CALL.error(format!(
                "rank 0 cannot listen at {rendezvous}: {why}; is another rank 0 running?"
            )));
        }
        std::thread::sleep(PAUSES.1);
    }
}

/// One address at least.
fn resolve(rendezvous: &str) -> io::Result<Vec<SocketAddr>> {
    let addresses: Vec<SocketAddr> = rendezvous.to_socket_addrs()?.collect();
    if addresses.is_empty() {
        Err(io::Error::other("its name has no address"))
    } else {
        Ok(addresses)
    }
}

impl Desk {
    fn fill(&mut self, until: Instant, limit: Duration) -> Result<()> {
        while self.guests.iter().any(Option::is_none) {
            let seated = self.guests.iter().flatten().filter_map(|(_, guest)| guest.as_ref());
            let sockets = seated
                .chain(&self.callers)
                .map(|caller| caller.socket.as_fd())
                .chain([self.door.as_fd()]);
            if !wait_until(until, sockets).map_err(|error| CALL.error(error.to_string()))? {
                return Err(self.incomplete(limit));
            }
            self.part_with_the_gone();
            self.callers.extend(
                Caller::all_at(&self.door)
                    .map_err(|error| CALL.error(format!("cannot let a rank in: {error}")))?,
            );
            self.listen_to_callers()?;
        }
        Ok(())
    }

    /// A rank that went away again may come again.
    fn part_with_the_gone(&mut self) {
        for (rank, guest) in self.guests.iter_mut().enumerate() {
            if let Some((seat, Some(_))) = guest
                .take_if(|(_, caller)| caller.as_ref().is_some_and(|caller| !caller.is_silent()))
            {
                tracing::warn!("rank {rank} of host {} went away again", one_line(&seat.host));
            }
        }
    }

    fn listen_to_callers(&mut self) -> Result<()> {
        for mut caller in std::mem::take(&mut self.callers) {
            match caller.hear::<Hello>(SHORT_BYTES) {
                Heard::Nothing => self.callers.push(caller),
                Heard::Record(hello) => self.admit(caller, hello)?,
                Heard::Stranger(why) => ignore(&caller, &why),
            }
        }
        let too_many = self.callers.len().saturating_sub(self.place.world_size + SILENT_STRANGERS);
        self.callers
            .drain(..too_many)
            .for_each(|caller| ignore(&caller, "it says nothing, and others want to come in"));
        Ok(())
    }

    fn admit(
        &mut self,
        caller: Caller,
        Hello { build, rank, world_size, mut seat }: Hello,
    ) -> Result<()> {
        if build != BUILD {
            ignore(&caller, &format!("it is of version {}, not {BUILD}", one_line(&build)));
            return Ok(());
        }
        let (host, expected) = (one_line(&seat.host), self.place.world_size);
        if world_size != expected || rank >= expected {
            let what = format!(
                "a process of host {host} is rank {rank} of {world_size}, rank 0 is one of {expected}"
            );
            self.callers.push(caller);
            return Err(Error::environment(what));
        }
        if let Some((other, _)) = &self.guests[rank] {
            let what = format!(
                "two processes are rank {rank}, one of host {} and one of host {host}: does each have a SLURM_PROCID or FM_DIST_RANK of its own?",
                one_line(&other.host)
            );
            self.callers.push(caller);
            return Err(Error::environment(what));
        }
        seat.addresses.push(caller.address.ip());
        self.guests[rank] = Some((seat, Some(caller)));
        Ok(())
    }

    fn incomplete(&self, limit: Duration) -> Error {
        let ranks = |is_here: bool| {
            let ranks =
                (0..self.guests.len()).filter(|rank| self.guests[*rank].is_some() == is_here);
            ranks.map(|rank| rank.to_string()).collect::<Vec<_>>().join(" ")
        };
        let silent = match self.callers.len() {
            0 => String::new(),
            callers => format!("; {callers} connections said nothing"),
        };
        let (arrived, missing) = (ranks(true), ranks(false));
        CALL.error(format!(
            "not all ranks came within {} s: arrived: {arrived}; missing: {missing}{silent}",
            limit.as_secs_f64()
        ))
    }

    fn welcome(mut self) -> Result<Company> {
        self.callers
            .drain(..)
            .for_each(|caller| ignore(&caller, "it says nothing, and all ranks are here"));
        let seats: Vec<Seat> = self.guests.iter().flatten().map(|(seat, _)| seat.clone()).collect();
        let token = random_token()?;
        self.answer(&Answer::Welcome { token: token.clone(), seats: seats.clone() });
        Ok(Company { token, seats, root: None })
    }

    /// Says the same to all; who does not hear it any more is missed soon enough.
    fn answer(&self, answer: &Answer) {
        let seated = self.guests.iter().flatten().filter_map(|(_, guest)| guest.as_ref());
        for caller in seated.chain(&self.callers) {
            if let Err(error) = say(&caller.socket, answer) {
                tracing::warn!("{} cannot be answered: {error}", caller.address);
            }
        }
    }
}

pub fn ignore(caller: &Caller, why: &str) {
    tracing::warn!("ignored a connection from {}: {why}", caller.address);
}

fn random_token() -> Result<String> {
    let mut bytes = [0; 16];
    let filled = getrandom(&mut bytes, GetRandomFlags::empty());
    filled.map_err(|error| CALL.error(format!("no random numbers: {error}")))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// Every other rank's part: finds rank 0, which may start later, and waits for its answer.
fn register(place: Place, rendezvous: &str, seat: Seat, limit: Duration) -> Result<Company> {
    let (until, mut pause) = (Instant::now() + limit, PAUSES.0);
    loop {
        let why = match knock(place, rendezvous, &seat, until)
            .and_then(|caller| hear_answer(place, caller, Instant::now() + limit + GRACE))
        {
            Ok((root, Answer::Welcome { token, seats })) => {
                return Ok(Company { token, seats, root: Some(root) });
            }
            Ok((_, Answer::Refused { code, what })) => {
                return Err(Error::Peer {
                    speaker: None,
                    code,
                    what: format!("rank 0 failed: {}", one_line(&what)),
                });
            }
            Err(why) => why,
        };
        if Instant::now() + pause > until {
            return Err(CALL.error(format!(
                "rank 0 is not at {rendezvous} after {} s: {why}",
                limit.as_secs_f64()
            )));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Tells rank 0 of this rank.
fn knock(place: Place, rendezvous: &str, seat: &Seat, until: Instant) -> Result<Caller, String> {
    let addresses = resolve(rendezvous).map_err(|error| error.to_string())?;
    let mut why = String::new();
    for address in addresses {
        let socket = match TcpStream::connect_timeout(&address, patience(until)) {
            Ok(socket) => socket,
            Err(error) => {
                why = error.to_string();
                continue;
            }
        };
        let mut seat = seat.clone();
        seat.addresses.extend(socket.local_addr().map(|address| address.ip()));
        let hello =
            Hello { build: BUILD.into(), rank: place.rank, world_size: place.world_size, seat };
        let said = say(&socket, &hello).and_then(|()| Caller::new(socket, address));
        return said.map_err(|error| error.to_string());
    }
    Err(why)
}

/// For one attempt to connect.
pub fn patience(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), ATTEMPT)
}

/// What rank 0 says, and the address at which it said it.
fn hear_answer(
    place: Place,
    mut caller: Caller,
    until: Instant,
) -> Result<(IpAddr, Answer), String> {
    let longest = SHORT_BYTES * place.world_size;
    loop {
        match caller.hear(longest) {
            Heard::Record(Answer::Welcome { seats, .. }) if seats.len() != place.world_size => {
                return Err(format!("it knows of {} ranks", seats.len()));
            }
            Heard::Record(answer) => return Ok((caller.address.ip(), answer)),
            Heard::Stranger(why) => return Err(why),
            Heard::Nothing => (),
        }
        if !wait_until(until, [caller.socket.as_fd()].into_iter())
            .map_err(|error| error.to_string())?
        {
            return Err("it does not answer".into());
        }
    }
}
