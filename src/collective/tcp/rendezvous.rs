//! How ranks learn where the others are: all tell rank 0, and rank 0 tells all.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::super::exchange::Membership;
use super::connection::Connection;
use super::mesh_setup;
use super::roster::{CALL, Endpoint, Roster, ignore, patience};
use super::setup_message::{Incoming, Received, SHORT_BYTES, say, wait_until};
use crate::error::{Error, Result, one_line};

/// Records of different builds need not fit together, and digests of operations do not.
const BUILD: &str = env!("CARGO_PKG_VERSION");

/// Between attempts, at first and at last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Rank 0 gives up by its own clock, which began later than this rank's connection at the latest;
/// then it says why.
const GRACE: Duration = Duration::from_secs(5);

/// Strangers that may stay for a while in silence; the oldest goes when there are more.
const SILENT_STRANGERS: usize = 64;

/// What a rank tells rank 0.
#[derive(Deserialize, Serialize)]
struct Register {
    build: String,
    rank: usize,
    world_size: usize,
    endpoint: Endpoint,
}

/// What rank 0 tells a rank.
#[derive(Deserialize, Serialize)]
enum Reply {
    Welcome {
        /// Known to the ranks of this world only.
        token: String,
        endpoints: Vec<Endpoint>,
    },
    Refused {
        code: i32,
        what: String,
    },
}

/// A connection with every other rank; every rank calls it, and each step of it ends within
/// `limit`. `refusing`: called on rank 0 with the reason before it turns the others away.
pub fn meet(
    membership: Membership,
    rendezvous: &str,
    limit: Duration,
    refusing: &dyn Fn(&Error),
) -> Result<Vec<Connection>> {
    let door = listen(None).map_err(|error| CALL.error(format!("cannot listen: {error}")))?;
    let port = door
        .local_addr()
        .map_err(|error| CALL.error(format!("no port to listen at: {error}")))?
        .port();
    let endpoint = Endpoint {
        host: gethostname::gethostname().to_string_lossy().into_owned(),
        addresses: Vec::new(),
        port,
    };
    let roster = match membership.rank {
        0 => receive(membership, rendezvous, endpoint, limit, refusing)?,
        _ => register(membership, rendezvous, endpoint, limit)?,
    };
    mesh_setup::connect_all(membership, &roster, &door, limit)
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

/// Rank 0's coordinator.
struct Coordinator {
    membership: Membership,
    door: TcpListener,
    /// Who has come, by rank; rank 0 has no connection.
    registered: Vec<Option<(Endpoint, Option<Incoming>)>>,
    incoming: Vec<Incoming>,
}

/// Rank 0's part: waits for all ranks, and answers them.
fn receive(
    membership: Membership,
    rendezvous: &str,
    endpoint: Endpoint,
    limit: Duration,
    refusing: &dyn Fn(&Error),
) -> Result<Roster> {
    let until = Instant::now() + limit;
    let mut coordinator = Coordinator {
        membership,
        door: open(rendezvous, until)?,
        registered: (0..membership.world_size).map(|_| None).collect(),
        incoming: Vec::new(),
    };
    coordinator.registered[0] = Some((endpoint, None));
    match coordinator.fill(until, limit) {
        Ok(()) => coordinator.welcome(),
        Err(error) => {
            refusing(&error);
            coordinator
                .answer(&Reply::Refused { code: error.exit_code(), what: error.to_string() });
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

impl Coordinator {
    fn fill(&mut self, until: Instant, limit: Duration) -> Result<()> {
        while self.registered.iter().any(Option::is_none) {
            let seated =
                self.registered.iter().flatten().filter_map(|(_, connection)| connection.as_ref());
            let sockets = seated
                .chain(&self.incoming)
                .map(|incoming| incoming.socket.as_fd())
                .chain([self.door.as_fd()]);
            if !wait_until(until, sockets).map_err(|error| CALL.error(error.to_string()))? {
                return Err(self.incomplete(limit));
            }
            self.forget_disconnected();
            self.incoming.extend(
                Incoming::all_at(&self.door)
                    .map_err(|error| CALL.error(format!("cannot let a rank in: {error}")))?,
            );
            self.read_registrations()?;
        }
        Ok(())
    }

    /// A rank that went away again may come again.
    fn forget_disconnected(&mut self) {
        for (rank, connection) in self.registered.iter_mut().enumerate() {
            if let Some((endpoint, Some(_))) = connection.take_if(|(_, incoming)| {
                incoming.as_ref().is_some_and(|incoming| !incoming.is_silent())
            }) {
                tracing::warn!("rank {rank} of host {} went away again", one_line(&endpoint.host));
            }
        }
    }

    fn read_registrations(&mut self) -> Result<()> {
        for mut incoming in std::mem::take(&mut self.incoming) {
            match incoming.hear::<Register>(SHORT_BYTES) {
                Received::Partial => self.incoming.push(incoming),
                Received::Message(hello) => self.admit(incoming, hello)?,
                Received::Stranger(why) => ignore(&incoming, &why),
            }
        }
        let too_many =
            self.incoming.len().saturating_sub(self.membership.world_size + SILENT_STRANGERS);
        self.incoming
            .drain(..too_many)
            .for_each(|incoming| ignore(&incoming, "it says nothing, and others want to come in"));
        Ok(())
    }

    fn admit(
        &mut self,
        incoming: Incoming,
        Register { build, rank, world_size, mut endpoint }: Register,
    ) -> Result<()> {
        if build != BUILD {
            ignore(&incoming, &format!("it is of version {}, not {BUILD}", one_line(&build)));
            return Ok(());
        }
        let (host, expected) = (one_line(&endpoint.host), self.membership.world_size);
        if world_size != expected || rank >= expected {
            let what = format!(
                "a process of host {host} is rank {rank} of {world_size}, rank 0 is one of {expected}"
            );
            self.incoming.push(incoming);
            return Err(Error::environment(what));
        }
        if let Some((other, _)) = &self.registered[rank] {
            let what = format!(
                "two processes are rank {rank}, one of host {} and one of host {host}: does each have a SLURM_PROCID or FM_DIST_RANK of its own?",
                one_line(&other.host)
            );
            self.incoming.push(incoming);
            return Err(Error::environment(what));
        }
        endpoint.addresses.push(incoming.address.ip());
        self.registered[rank] = Some((endpoint, Some(incoming)));
        Ok(())
    }

    fn incomplete(&self, limit: Duration) -> Error {
        let ranks = |is_here: bool| {
            let ranks = (0..self.registered.len())
                .filter(|rank| self.registered[*rank].is_some() == is_here);
            ranks.map(|rank| rank.to_string()).collect::<Vec<_>>().join(" ")
        };
        let silent = match self.incoming.len() {
            0 => String::new(),
            incoming => format!("; {incoming} connections said nothing"),
        };
        let (arrived, missing) = (ranks(true), ranks(false));
        CALL.error(format!(
            "not all ranks came within {} s: arrived: {arrived}; missing: {missing}{silent}",
            limit.as_secs_f64()
        ))
    }

    fn welcome(mut self) -> Result<Roster> {
        self.incoming
            .drain(..)
            .for_each(|incoming| ignore(&incoming, "it says nothing, and all ranks are here"));
        let endpoints: Vec<Endpoint> =
            self.registered.iter().flatten().map(|(endpoint, _)| endpoint.clone()).collect();
        let token = random_token()?;
        self.answer(&Reply::Welcome { token: token.clone(), endpoints: endpoints.clone() });
        Ok(Roster { token, endpoints, root: None })
    }

    /// Says the same to all; who does not hear it any more is missed soon enough.
    fn answer(&self, answer: &Reply) {
        let seated =
            self.registered.iter().flatten().filter_map(|(_, connection)| connection.as_ref());
        for incoming in seated.chain(&self.incoming) {
            if let Err(error) = say(&incoming.socket, answer) {
                tracing::warn!("{} cannot be answered: {error}", incoming.address);
            }
        }
    }
}

fn random_token() -> Result<String> {
    let mut bytes = [0; 16];
    let filled = getrandom(&mut bytes, GetRandomFlags::empty());
    filled.map_err(|error| CALL.error(format!("no random numbers: {error}")))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// Every other rank's part: finds rank 0, which may start later, and waits for its answer.
fn register(
    membership: Membership,
    rendezvous: &str,
    endpoint: Endpoint,
    limit: Duration,
) -> Result<Roster> {
    let (until, mut pause) = (Instant::now() + limit, PAUSES.0);
    loop {
        let why = match register_once(membership, rendezvous, &endpoint, until)
            .and_then(|incoming| read_reply(membership, incoming, Instant::now() + limit + GRACE))
        {
            Ok((root, Reply::Welcome { token, endpoints })) => {
                return Ok(Roster { token, endpoints, root: Some(root) });
            }
            Ok((_, Reply::Refused { code, what })) => {
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
fn register_once(
    membership: Membership,
    rendezvous: &str,
    endpoint: &Endpoint,
    until: Instant,
) -> Result<Incoming, String> {
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
        let mut endpoint = endpoint.clone();
        endpoint.addresses.extend(socket.local_addr().map(|address| address.ip()));
        let hello = Register {
            build: BUILD.into(),
            rank: membership.rank,
            world_size: membership.world_size,
            endpoint,
        };
        let said = say(&socket, &hello).and_then(|()| Incoming::new(socket, address));
        return said.map_err(|error| error.to_string());
    }
    Err(why)
}

/// What rank 0 says, and the address at which it said it.
fn read_reply(
    membership: Membership,
    mut incoming: Incoming,
    until: Instant,
) -> Result<(IpAddr, Reply), String> {
    let longest = SHORT_BYTES * membership.world_size;
    loop {
        match incoming.hear(longest) {
            Received::Message(Reply::Welcome { endpoints, .. })
                if endpoints.len() != membership.world_size =>
            {
                return Err(format!("it knows of {} ranks", endpoints.len()));
            }
            Received::Message(answer) => return Ok((incoming.address.ip(), answer)),
            Received::Stranger(why) => return Err(why),
            Received::Partial => (),
        }
        if !wait_until(until, [incoming.socket.as_fd()].into_iter())
            .map_err(|error| error.to_string())?
        {
            return Err("it does not answer".into());
        }
    }
}
