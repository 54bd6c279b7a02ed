//! Distributes the ranks' addresses: every rank registers at rank 0, which sends the roster to all.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::super::exchange::Membership;
use super::connection::Connection;
use super::mesh_setup;
use super::roster::{CALL, Endpoint, Roster, attempt_timeout, ignore};
use super::setup_message::{Incoming, Received, SHORT_BYTES, send_record, wait_until};
use crate::error::{Error, Result, one_line};

/// Ranks must be of one build: others may have other records, and compute other digests of
/// operations.
const BUILD: &str = env!("CARGO_PKG_VERSION");

/// First and longest pause between attempts to reach rank 0.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Time that a rank waits longer than rank 0 does: rank 0's clock may have started as late as this
/// rank's connection, and it then sends its reason.
const GRACE: Duration = Duration::from_secs(5);

/// Connections kept open that have not sent anything yet; the oldest is closed when there are more.
const SILENT_STRANGERS: usize = 64;

/// Record that a rank sends to rank 0.
#[derive(Deserialize, Serialize)]
struct Register {
    build: String,
    rank: usize,
    world_size: usize,
    endpoint: Endpoint,
}

/// Record with which rank 0 answers.
#[derive(Deserialize, Serialize)]
enum Reply {
    Welcome {
        /// Secret that only the ranks of this world know.
        token: String,
        endpoints: Vec<Endpoint>,
    },
    Refused {
        code: i32,
        what: String,
    },
}

/// Returns a connection to every other rank. Every rank calls it; each of its steps ends within
/// `limit`. Rank 0 calls `on_refusal` with the reason before it refuses the others.
pub fn meet(
    membership: Membership,
    rendezvous: &str,
    limit: Duration,
    on_refusal: &dyn Fn(&Error),
) -> Result<Vec<Connection>> {
    let listener = listen(None).map_err(|error| CALL.error(format!("cannot listen: {error}")))?;
    let port = listener
        .local_addr()
        .map_err(|error| CALL.error(format!("no port to listen at: {error}")))?
        .port();
    let endpoint = Endpoint {
        host: gethostname::gethostname().to_string_lossy().into_owned(),
        addresses: Vec::new(),
        port,
    };
    let roster = match membership.rank {
        0 => coordinate(membership, rendezvous, endpoint, limit, on_refusal)?,
        _ => register(membership, rendezvous, endpoint, limit)?,
    };
    mesh_setup::connect_all(membership, &roster, &listener, limit)
}

/// Listens at a loopback address if `address` is one, otherwise on its port (without an address, on
/// a free port) on all interfaces: hosts often resolve their own name to an address of another
/// interface.
fn listen(address: Option<SocketAddr>) -> io::Result<TcpListener> {
    let port = address.map_or(0, |address| address.port());
    let listener = match address.filter(|address| address.ip().is_loopback()) {
        Some(address) => TcpListener::bind(address),
        None => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))),
    }?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Rank 0's side of the registration.
struct Coordinator {
    membership: Membership,
    listener: TcpListener,
    /// Registered ranks with their connections, by rank; rank 0 has no connection.
    registered: Vec<Option<(Endpoint, Option<Incoming>)>>,
    incoming: Vec<Incoming>,
}

/// Rank 0's side: waits for all ranks, and answers them.
fn coordinate(
    membership: Membership,
    rendezvous: &str,
    endpoint: Endpoint,
    limit: Duration,
    on_refusal: &dyn Fn(&Error),
) -> Result<Roster> {
    let until = Instant::now() + limit;
    let mut coordinator = Coordinator {
        membership,
        listener: open(rendezvous, until)?,
        registered: (0..membership.world_size).map(|_| None).collect(),
        incoming: Vec::new(),
    };
    coordinator.registered[0] = Some((endpoint, None));
    match coordinator.accept_all(until, limit) {
        Ok(()) => coordinator.welcome(),
        Err(error) => {
            on_refusal(&error);
            coordinator
                .answer(&Reply::Refused { code: error.exit_code(), what: error.to_string() });
            Err(error)
        }
    }
}

/// Listens at the rendezvous. Retries while the port is taken, because it may become free, e.g.
/// when the job's previous attempt ends.
fn open(rendezvous: &str, until: Instant) -> Result<TcpListener> {
    loop {
        let why = match resolve(rendezvous).and_then(|addresses| listen(addresses.first().copied()))
        {
            Ok(listener) => return Ok(listener),
            Err(error) => error,
        };
        if Instant::now() + LONGEST_PAUSE > until {
            return Err(CALL.error(format!(
                "rank 0 cannot listen at {rendezvous}: {why}; is another rank 0 running?"
            )));
        }
        std::thread::sleep(LONGEST_PAUSE);
    }
}

/// Returns at least one address.
fn resolve(rendezvous: &str) -> io::Result<Vec<SocketAddr>> {
    let addresses: Vec<SocketAddr> = rendezvous.to_socket_addrs()?.collect();
    if addresses.is_empty() {
        Err(io::Error::other("its name has no address"))
    } else {
        Ok(addresses)
    }
}

impl Coordinator {
    fn accept_all(&mut self, until: Instant, limit: Duration) -> Result<()> {
        while self.registered.iter().any(Option::is_none) {
            let connections =
                self.registered.iter().flatten().filter_map(|(_, connection)| connection.as_ref());
            let sockets = connections
                .chain(&self.incoming)
                .map(|incoming| incoming.socket.as_fd())
                .chain([self.listener.as_fd()]);
            if !wait_until(until, sockets).map_err(|error| CALL.error(error.to_string()))? {
                return Err(self.incomplete(limit));
            }
            self.forget_disconnected();
            self.incoming.extend(
                Incoming::accept_all(&self.listener)
                    .map_err(|error| CALL.error(format!("cannot let a rank in: {error}")))?,
            );
            self.read_registrations()?;
        }
        Ok(())
    }

    /// Forgets the ranks whose connection is closed; they may register again.
    fn forget_disconnected(&mut self) {
        for (rank, connection) in self.registered.iter_mut().enumerate() {
            if let Some((endpoint, Some(_))) = connection.take_if(|(_, incoming)| {
                incoming.as_ref().is_some_and(|incoming| !incoming.is_open_and_silent())
            }) {
                tracing::warn!("rank {rank} of host {} went away again", one_line(&endpoint.host));
            }
        }
    }

    fn read_registrations(&mut self) -> Result<()> {
        for mut incoming in std::mem::take(&mut self.incoming) {
            match incoming.receive::<Register>(SHORT_BYTES) {
                Received::Partial => self.incoming.push(incoming),
                Received::Message(registration) => self.admit(incoming, registration)?,
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

    /// Sends the same answer to all. A rank that cannot be reached any more will be missed when the
    /// mesh is set up.
    fn answer(&self, answer: &Reply) {
        let connections =
            self.registered.iter().flatten().filter_map(|(_, connection)| connection.as_ref());
        for incoming in connections.chain(&self.incoming) {
            if let Err(error) = send_record(&incoming.socket, answer) {
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

/// The side of every other rank: finds rank 0, which may start later, and waits for its answer.
fn register(
    membership: Membership,
    rendezvous: &str,
    endpoint: Endpoint,
    limit: Duration,
) -> Result<Roster> {
    let (until, mut pause) = (Instant::now() + limit, FIRST_PAUSE);
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
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Connects to rank 0 and sends this rank's registration.
fn register_once(
    membership: Membership,
    rendezvous: &str,
    endpoint: &Endpoint,
    until: Instant,
) -> Result<Incoming, String> {
    let addresses = resolve(rendezvous).map_err(|error| error.to_string())?;
    let mut why = String::new();
    for address in addresses {
        let socket = match TcpStream::connect_timeout(&address, attempt_timeout(until)) {
            Ok(socket) => socket,
            Err(error) => {
                why = error.to_string();
                continue;
            }
        };
        let mut endpoint = endpoint.clone();
        endpoint.addresses.extend(socket.local_addr().map(|address| address.ip()));
        let registration = Register {
            build: BUILD.into(),
            rank: membership.rank,
            world_size: membership.world_size,
            endpoint,
        };
        let sent =
            send_record(&socket, &registration).and_then(|()| Incoming::new(socket, address));
        return sent.map_err(|error| error.to_string());
    }
    Err(why)
}

/// Returns rank 0's answer, and the address at which rank 0 was reached.
fn read_reply(
    membership: Membership,
    mut incoming: Incoming,
    until: Instant,
) -> Result<(IpAddr, Reply), String> {
    let longest = SHORT_BYTES * membership.world_size;
    loop {
        match incoming.receive(longest) {
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
