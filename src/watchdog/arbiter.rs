//! Rank 0's desk, at which failing ranks ask for the word beside all collectives, so that one of
//! them says why the run ends.
//!
//! A thread of rank 0 answers, which nothing else keeps busy, so that an answer comes whatever the
//! ranks' own threads do. Only where rank 0 is stopped, dead or cut off does none come; then ranks
//! take turns by their number.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread::Builder;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::beats::{Meeting, cannot_open};
use crate::error::{Error, Result};
use crate::failure;
use crate::pulse;

/// Time for which rank 0 is asked, and between two questions: a datagram may be lost, and a busy
/// machine wakes a thread late.
const PATIENCE: Duration = Duration::from_secs(5);
const INTERVAL: Duration = Duration::from_millis(250);

/// A rank asks for the word, perhaps in place of one that has it.
#[derive(Deserialize, Serialize)]
struct Wish {
    token: u64,
    rank: usize,
    instead_of: Option<usize>,
}

/// The answer: the rank that has the word.
#[derive(Deserialize, Serialize)]
struct Word {
    token: u64,
    speaker: usize,
}

/// Opens rank 0's desk, for the rest of the process; returns its port. A wish that does not carry
/// the token, or is of no rank of the run, is somebody else's and gets no answer.
///
/// # Errors
/// [`Error::Environment`] if no socket can be opened or no thread started.
pub fn open_desk(world_size: usize, token: u64) -> Result<u16> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(cannot_open)?;
    let port = socket.local_addr().map_err(cannot_open)?.port();
    let serve = move || {
        loop {
            answer(&socket, world_size, token);
        }
    };
    let thread = Builder::new().name("word".into()).spawn(serve);
    thread.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
    failure::ask_by(|instead_of| Some(failure::give_word(0, instead_of)));
    Ok(port)
}

fn answer(socket: &UdpSocket, world_size: usize, token: u64) {
    let Some((wish, sender)) = receive::<Wish>(socket) else { return };
    if wish.token == token && wish.rank < world_size {
        send(
            socket,
            &Word { token, speaker: failure::give_word(wish.rank, wish.instead_of) },
            sender,
        );
    }
}

/// From now on this rank asks at the desk of the meeting.
pub fn ask_at(meeting: &Meeting) {
    let (desks, token) = (meeting.desks(), meeting.token());
    failure::ask_by(move |instead_of| {
        ask(&desks, &Wish { token, rank: pulse::place().0, instead_of })
    });
}

fn ask(desks: &[SocketAddr], wish: &Wish) -> Option<usize> {
    // A socket of its own for each wish, so that no late answer to another one is taken for its
    // own.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.set_read_timeout(Some(INTERVAL)).ok()?;
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        desks.iter().for_each(|desk| send(&socket, wish, *desk));
        if let Some((word, _)) =
            receive::<Word>(&socket).filter(|(word, _)| word.token == wish.token)
        {
            return Some(word.speaker);
        }
    }
    None
}

/// The next datagram, if it reads as a `T`.
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
        let port = open_desk(10, 7).unwrap();
        let desks = [SocketAddr::from((Ipv4Addr::LOCALHOST, port))];
        let wish = |rank: usize, token: u64| Wish { token, rank, instead_of: None };
        let threads = [3, 1, 2].map(|rank| std::thread::spawn(move || ask(&desks, &wish(rank, 7))));
        let heard = threads.map(|thread| thread.join().unwrap().unwrap());
        assert!(
            heard.iter().all(|speaker| *speaker == heard[0] && [1, 2, 3].contains(speaker)),
            "{heard:?}"
        );
        assert_eq!(
            ask(&desks, &Wish { instead_of: Some(heard[0]), ..wish(9, 7) }),
            Some(9),
            "rank 9 takes over"
        );
        let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        stranger.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        send(&stranger, &wish(1, 8), desks[0]);
        send(&stranger, &wish(10, 7), desks[0]);
        assert!(receive::<Word>(&stranger).is_none());
    }
}
