//! Rank 0's arbiter: failing ranks ask it, outside of any collective, to become the speaker, so
//! that only one of them prints why the run ends (see [`failure`]).
//!
//! It runs on a thread of rank 0 that does nothing else, so it answers whatever the ranks' own
//! threads do. There is no answer only if rank 0 is suspended, dead or cut off; then ranks take
//! turns by number.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread::Builder;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::beats::{HubAddress, cannot_open};
use crate::error::{Error, Result};
use crate::failure;
use crate::pulse;

/// Time for which a rank asks, and the interval between two requests: a datagram may be lost, and a
/// busy machine wakes a thread late.
const TIMEOUT: Duration = Duration::from_secs(5);
const INTERVAL: Duration = Duration::from_millis(250);

/// A rank asks to become the speaker, perhaps in place of one that is.
#[derive(Deserialize, Serialize)]
struct Request {
    token: u64,
    rank: usize,
    instead_of: Option<usize>,
}

/// The answer: the rank that is the speaker.
#[derive(Deserialize, Serialize)]
struct Reply {
    token: u64,
    speaker: usize,
}

/// Starts rank 0's arbiter for the rest of the process; returns its port. A request without the
/// token, or of a rank outside the world, gets no answer.
///
/// # Errors
/// [`Error::Environment`] if no socket can be opened or no thread started.
pub fn open(world_size: usize, token: u64) -> Result<u16> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(cannot_open)?;
    let port = socket.local_addr().map_err(cannot_open)?.port();
    let serve = move || {
        loop {
            answer(&socket, world_size, token);
        }
    };
    let thread = Builder::new().name("arbiter".into()).spawn(serve);
    thread.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
    failure::set_arbiter(|instead_of| Some(failure::appoint_speaker(0, instead_of)));
    Ok(port)
}

fn answer(socket: &UdpSocket, world_size: usize, token: u64) {
    let Some((request, sender)) = receive::<Request>(socket) else { return };
    if request.token == token && request.rank < world_size {
        send(
            socket,
            &Reply { token, speaker: failure::appoint_speaker(request.rank, request.instead_of) },
            sender,
        );
    }
}

/// Makes this rank ask the arbiter at this address from now on.
pub fn use_arbiter(address: &HubAddress) {
    let (arbiters, token) = (address.arbiter_addresses(), address.token());
    failure::set_arbiter(move |instead_of| {
        ask(&arbiters, &Request { token, rank: pulse::rank(), instead_of })
    });
}

fn ask(arbiters: &[SocketAddr], request: &Request) -> Option<usize> {
    // Each request has a socket of its own, so that a late answer to another request is not taken
    // for its own.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.set_read_timeout(Some(INTERVAL)).ok()?;
    let began = Instant::now();
    while began.elapsed() < TIMEOUT {
        arbiters.iter().for_each(|arbiter| send(&socket, request, *arbiter));
        if let Some((reply, _)) =
            receive::<Reply>(&socket).filter(|(reply, _)| reply.token == request.token)
        {
            return Some(reply.speaker);
        }
    }
    None
}

/// Receives the next datagram; `None` if it does not parse as a `T`, or on a timeout.
fn receive<T: for<'d> Deserialize<'d>>(socket: &UdpSocket) -> Option<(T, SocketAddr)> {
    let mut buffer = [0; 512];
    let (bytes, sender) = socket.recv_from(&mut buffer).ok()?;
    Some((serde_json::from_slice(&buffer[..bytes]).ok()?, sender))
}

fn send(socket: &UdpSocket, message: &impl Serialize, to: SocketAddr) {
    let bytes = serde_json::to_vec(message).expect("numbers are JSON");
    // A lost datagram is sent again.
    let _ = socket.send_to(&bytes, to);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_ranks_that_ask_at_once_all_hear_of_one_and_a_stranger_of_none() {
        let port = open(10, 7).unwrap();
        let arbiters = [SocketAddr::from((Ipv4Addr::LOCALHOST, port))];
        let request = |rank: usize, token: u64| Request { token, rank, instead_of: None };
        let threads =
            [3, 1, 2].map(|rank| std::thread::spawn(move || ask(&arbiters, &request(rank, 7))));
        let heard = threads.map(|thread| thread.join().unwrap().unwrap());
        assert!(
            heard.iter().all(|speaker| *speaker == heard[0] && [1, 2, 3].contains(speaker)),
            "{heard:?}"
        );
        assert_eq!(
            ask(&arbiters, &Request { instead_of: Some(heard[0]), ..request(9, 7) }),
            Some(9),
            "rank 9 takes over"
        );
        let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        stranger.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        send(&stranger, &request(1, 8), arbiters[0]);
        send(&stranger, &request(10, 7), arbiters[0]);
        assert!(receive::<Reply>(&stranger).is_none());
    }
}
