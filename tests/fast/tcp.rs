//! Ranks meet over TCP without a launcher's help, keep the contract of the collectives, and notice
//! strangers, absent and dying ranks.
//!
//! The worlds are threads of this process at loopback ports; `tests/mpi/tcp.rs` has processes. Some
//! ranks are made by hand, to say what no rank of ours says.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fm_dist::collective::{Collective, ReduceOp, Tcp, Work};
use fm_dist::error::{Error, Result};
use serde_json::{Value, json};
use tch::Kind;

use crate::contract::{brought, contract};

/// No world of this file takes as long, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A port that nobody uses at present, and that systems give to no connection meanwhile, as they do
/// with those from 32768 on.
pub fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test processes side by side begin at ports of their own.
    let first = std::process::id() % 400 * 25;
    let addresses = std::iter::repeat_with(|| {
        format!("127.0.0.1:{}", 20_000 + (first + u32::from(NEXT.fetch_add(1, Relaxed))) % 10_000)
    });
    addresses.into_iter().find(|address| TcpListener::bind(address).is_ok()).unwrap()
}

/// One rank on a thread of its own, from the meeting on.
fn rank_of<T: Send + 'static>(
    (rank, world_size): (usize, usize),
    address: &str,
    limit: Duration,
    body: impl FnOnce(Tcp) -> Result<T> + Send + 'static,
) -> JoinHandle<Result<T>> {
    let address = address.to_string();
    thread::spawn(move || Tcp::connect(rank, world_size, &address, limit).and_then(body))
}

/// What `body` gives on each rank of a world, in rank order.
fn on_ranks<T: Send + 'static>(world_size: usize, body: fn(Tcp) -> Result<T>) -> Vec<Result<T>> {
    let address = free_address();
    let ranks: Vec<_> =
        (0..world_size).map(|rank| rank_of((rank, world_size), &address, LIMIT, body)).collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

#[test]
fn worlds_of_tcp_ranks_keep_the_contract() {
    for world_size in 1..=4 {
        let ends = on_ranks(world_size, |world| contract(&world));
        ends.into_iter().for_each(|end| end.unwrap());
    }
}

/// Many ranks come together, and sums have the bits of threads' sums.
#[test]
fn thirty_ranks_meet_and_agree() {
    let ends = on_ranks(30, |world| {
        let sum = brought(world.rank(), 10_000, Kind::BFloat16);
        world.all_reduce(vec![sum.shallow_clone()], ReduceOp::Max)?.wait()?;
        world.barrier()?;
        Ok(sum.sum(Kind::Double).double_value(&[]))
    });
    let sums: Vec<f64> = ends.into_iter().map(|end| end.unwrap()).collect();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}

/// A barrier's frame has a header alone. Rank 0 reads that of rank 1 while it waits for rank 2, and
/// nothing comes after it until rank 0 has answered.
#[test]
fn a_rank_that_is_ahead_at_a_barrier_is_not_waited_for_again() {
    let ends = on_ranks(3, |world| {
        let pair = world.split(world.rank() % 2)?;
        if world.rank() == 2 {
            thread::sleep(Duration::from_millis(300));
        }
        if world.rank() != 1 {
            pair.broadcast(brought(world.rank(), 8, Kind::Float), 1)?.wait()?;
        }
        world.barrier()?;
        let sent = brought(world.rank(), 8, Kind::Float);
        world.broadcast(sent.shallow_clone(), 0)?.wait()?;
        Ok(sent.sum(Kind::Double).double_value(&[]))
    });
    let sums: Vec<f64> = ends.into_iter().map(|end| end.unwrap()).collect();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}

#[test]
fn ranks_that_disagree_each_name_both_operations() {
    let ends = on_ranks(2, |world| {
        world.barrier()?;
        world
            .all_reduce(
                vec![brought(0, 10 * (1 + world.rank() as i64), Kind::Float)],
                ReduceOp::Sum,
            )
            .and_then(Work::wait)
    });
    let (ten, twenty) = ("all_reduce#2 (Sum of 10 Float)", "all_reduce#2 (Sum of 20 Float)");
    let texts = [
        format!("ranks disagree: rank 1 is at {twenty}, rank 0 at {ten}"),
        format!("ranks disagree: rank 0 is at {ten}, rank 1 at {twenty}"),
    ];
    // Who sees it first closes its connection, which the other may see before it reads what came.
    let errors: Vec<Error> = ends.into_iter().map(|end| end.unwrap_err()).collect();
    assert!(errors.iter().any(|error| error.exit_code() == 42), "{errors:?}");
    for (error, text) in errors.iter().zip(texts).filter(|(error, _)| error.exit_code() == 42) {
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn ranks_that_came_to_one_operation_by_different_ways_disagree() {
    let ends = on_ranks(2, |world| {
        // Nothing travels for it, so that only its trace in the digest tells.
        let _ = world.all_reduce(
            vec![brought(0, 0, [Kind::Float, Kind::Double][world.rank()])],
            ReduceOp::Sum,
        )?;
        world.all_reduce(vec![brought(0, 8, Kind::Float)], ReduceOp::Sum).and_then(Work::wait)
    });
    let errors: Vec<Error> = ends.into_iter().map(|end| end.unwrap_err()).collect();
    assert!(
        errors.iter().any(|error| error.to_string().contains("but came there by other operations")),
        "{errors:?}"
    );
}

#[test]
fn ranks_that_do_not_come_are_named_by_all_that_did() {
    let (address, limit) = (free_address(), Duration::from_secs(5));
    let began = Instant::now();
    let ranks: Vec<_> = [0, 1, 3]
        .map(|rank| rank_of((rank, 4), &address, limit, |world| world.barrier()))
        .into_iter()
        .collect();
    let errors: Vec<Error> =
        ranks.into_iter().map(|rank| rank.join().unwrap().unwrap_err()).collect();
    assert!(began.elapsed() < limit * 4, "{:?}", began.elapsed());
    assert!(matches!(errors[0], Error::Collective { operation: "connect", .. }), "{:?}", errors[0]);
    for error in errors {
        assert_eq!(error.exit_code(), 22);
        assert!(
            error.to_string().contains("not all ranks came within 5 s: arrived: 0 1 3; missing: 2"),
            "{error}"
        );
    }
}

#[test]
fn a_world_without_rank_0_ends_within_its_limit() {
    let address = free_address();
    let error = Tcp::connect(1, 2, &address, Duration::from_millis(300)).err().unwrap();
    assert!(
        error.to_string().contains(&format!("rank 0 is not at {address} after 0.3 s")),
        "{error}"
    );
}

#[test]
fn two_processes_that_claim_one_rank_are_both_told() {
    let address = free_address();
    let ranks: Vec<_> = [0, 1, 1]
        .map(|rank| rank_of((rank, 3), &address, LIMIT, |world| world.barrier()))
        .into_iter()
        .collect();
    for error in ranks.into_iter().map(|rank| rank.join().unwrap().unwrap_err()) {
        assert_eq!(error.exit_code(), 52);
        assert!(error.to_string().contains("two processes are rank 1"), "{error}");
    }
}

#[test]
fn ranks_of_worlds_of_different_sizes_do_not_meet() {
    let address = free_address();
    let ranks = [
        rank_of((0, 2), &address, LIMIT, |world| world.barrier()),
        rank_of((2, 3), &address, LIMIT, |world| world.barrier()),
    ];
    for error in ranks.into_iter().map(|rank| rank.join().unwrap().unwrap_err()) {
        assert_eq!(error.exit_code(), 52);
        assert!(error.to_string().contains("is rank 2 of 3, rank 0 is one of 2"), "{error}");
    }
}

/// A connection to what will listen there soon.
fn connected(address: &str) -> TcpStream {
    let began = Instant::now();
    loop {
        match TcpStream::connect(address) {
            Ok(socket) => {
                socket.set_read_timeout(Some(LIMIT)).unwrap();
                return socket;
            }
            Err(error) => assert!(
                began.elapsed() < LIMIT && error.kind() == ErrorKind::ConnectionRefused,
                "{error}"
            ),
        }
        thread::yield_now();
    }
}

/// A record as ranks send them before they are connected.
fn record(text: &str) -> Vec<u8> {
    [&b"fm-tcp\x00\x02"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn register(build: &str, rank: usize) -> Vec<u8> {
    let endpoint = json!({"host": "by hand", "addresses": [], "port": 1});
    record(
        &json!({"build": build, "rank": rank, "world_size": 2, "endpoint": endpoint}).to_string(),
    )
}

fn read_record(mut socket: &TcpStream) -> Value {
    let mut head = [0; 12];
    socket.read_exact(&mut head).unwrap();
    let mut text = vec![0; u32::from_le_bytes(head[8..].try_into().unwrap()) as usize];
    socket.read_exact(&mut text).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Waits until the other side has closed.
fn is_closed(mut socket: TcpStream) -> bool {
    match socket.read(&mut [0]) {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn strangers_at_the_rendezvous_neither_stop_nor_delay_it() {
    let address = free_address();
    let zero = rank_of((0, 2), &address, LIMIT, |world| world.barrier());
    let mut enormous = record("");
    enormous[8..].copy_from_slice(&u32::MAX.to_le_bytes());
    let strangers = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 100_000],
        enormous,
        record("[1, 2"),
        record(&"[".repeat(4000)),
        record("{\"build\": \"\\u001b[31m\"}"),
        register("0.0.0", 1),
    ];
    let silent = [connected(&address), connected(&address)];
    (&silent[1]).write_all(&register(env!("CARGO_PKG_VERSION"), 1)[..20]).unwrap();
    for words in strangers {
        let mut stranger = connected(&address);
        // It may be shown out before it has said all.
        let _ = stranger.write_all(&words);
        assert!(is_closed(stranger), "{:?}", String::from_utf8_lossy(&words[..12]));
    }
    let began = Instant::now();
    let one = rank_of((1, 2), &address, LIMIT, |world| world.barrier());
    one.join().unwrap().unwrap();
    zero.join().unwrap().unwrap();
    assert!(began.elapsed() < LIMIT / 4, "{:?}", began.elapsed());
    drop(silent);
}

/// Rank 1 of 2 made by hand: the other's door and the token of the world.
fn registered_by_hand(address: &str) -> (String, String) {
    let mut socket = connected(address);
    socket.write_all(&register(env!("CARGO_PKG_VERSION"), 1)).unwrap();
    let welcome = read_record(&socket)["Welcome"].take();
    let door = format!("127.0.0.1:{}", welcome["endpoints"][0]["port"]);
    (door, welcome["token"].as_str().unwrap().to_string())
}

fn hello(token: &str, from: usize, to: usize) -> Vec<u8> {
    record(&json!({"token": token, "from": from, "to": to}).to_string())
}

/// Connected with rank 0 as rank 1 of 2.
fn rank_by_hand(address: &str) -> TcpStream {
    let (door, token) = registered_by_hand(address);
    let mut socket = connected(&door);
    socket.write_all(&hello(&token, 1, 0)).unwrap();
    assert_eq!(read_record(&socket), json!({"token": token, "from": 0, "to": 1}));
    socket
}

#[test]
fn strangers_at_a_ranks_own_door_are_shown_out() {
    let address = free_address();
    let zero = rank_of((0, 2), &address, LIMIT, |_| Ok(()));
    let (door, token) = registered_by_hand(&address);
    let _silent = connected(&door);
    for words in [
        b"garbage".to_vec(),
        hello("0".repeat(32).as_str(), 1, 0),
        hello(&token, 1, 1),
        hello(&token, 7, 0),
    ] {
        let mut stranger = connected(&door);
        stranger.write_all(&words).unwrap();
        assert!(is_closed(stranger), "{}", String::from_utf8_lossy(&words));
    }
    let mut right = connected(&door);
    right.write_all(&hello(&token, 1, 0)).unwrap();
    zero.join().unwrap().unwrap();
}

/// A frame's header by hand.
fn frame(kind: u32, length: u64) -> Vec<u8> {
    let mut header = [&b"fmd\x01"[..], &kind.to_le_bytes(), &length.to_le_bytes()].concat();
    header.resize(128, 0);
    header
}

/// What an all-reduce of rank 0 ends with when rank 1 does as `body` says.
fn error_against(body: fn(TcpStream)) -> Error {
    let address = free_address();
    let zero = rank_of((0, 2), &address, LIMIT, |world| {
        let sum = world.all_reduce(vec![brought(0, 10, Kind::Float)], ReduceOp::Sum)?;
        sum.wait()
    });
    body(rank_by_hand(&address));
    zero.join().unwrap().unwrap_err()
}

/// What rank 0 says of its own first operation, so that only the length is wrong.
fn echoed_with_length(mut socket: TcpStream, length: u64) {
    let mut header = [0; 128];
    socket.read_exact(&mut header).unwrap();
    header[8..16].copy_from_slice(&length.to_le_bytes());
    socket.write_all(&header).unwrap();
    assert!(is_closed_after_all(socket));
}

fn is_closed_after_all(mut socket: TcpStream) -> bool {
    let mut rest = Vec::new();
    socket
        .read_to_end(&mut rest)
        .map_or_else(|error| error.kind() == ErrorKind::ConnectionReset, |_| true)
}

#[test]
fn frames_that_no_rank_sends_are_refused_before_anything_is_read_for_them() {
    type Deed = fn(TcpStream);
    let cases: [(Deed, &str); 3] = [
        (
            |mut socket| drop(socket.write_all(&[b'x'; 128])),
            "rank 1 (host by hand) sent what is no frame",
        ),
        (
            |socket| echoed_with_length(socket, 1 << 60),
            "announced 1152921504606846976 bytes in all_reduce#1 (Sum of 10 Float), 40 are due",
        ),
        (
            |mut socket| drop(socket.write_all(&frame(0, 40))),
            "ranks disagree: rank 1 is at , rank 0 at all_reduce#1 (Sum of 10 Float)",
        ),
    ];
    for (body, words) in cases {
        let error = error_against(body).to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_peer_that_is_gone_is_named_at_once() {
    let began = Instant::now();
    let error = error_against(drop);
    assert!(
        matches!(error, Error::Collective { backend: "tcp", operation: "all_reduce", .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("rank 1 (host by hand) closed its connection"), "{error}");
    assert!(began.elapsed() < LIMIT / 4, "{:?}", began.elapsed());
}

#[test]
fn the_code_of_a_peer_that_ends_the_run_arrives() {
    let error = error_against(|mut socket| drop(socket.write_all(&frame(2, 41))));
    assert!(
        matches!(&error, Error::Peer { speaker: None, code: 41, what } if what.contains("rank 1 (host by hand)")),
        "{error:?}"
    );
}

#[test]
fn a_rank_that_leaves_is_named_by_those_that_wait_for_it() {
    let ends = on_ranks(3, |world| {
        if world.rank() == 1 {
            return Ok(());
        }
        let gone = world.barrier();
        let later = world.barrier().unwrap_err().to_string();
        assert!(later.contains("given up after an earlier error"), "{later}");
        gone
    });
    assert!(ends[1].is_ok());
    for rank in [0, 2] {
        let error = ends[rank].as_ref().unwrap_err();
        // Of the two that wait, the second may see that the first has given up.
        assert!(error.to_string().contains("closed its connection"), "{error}");
    }
    assert!(
        [0, 2].iter().any(|rank| ends[*rank]
            .as_ref()
            .is_err_and(|error| error.to_string().contains("rank 1 (host"))),
        "{ends:?}"
    );
}

#[test]
fn a_rank_that_has_taken_leave_disturbs_nobody() {
    let ends = on_ranks(3, |world| {
        let part = world.split(world.rank() / 2)?;
        // Rank 2 is alone in its part, and leaves while the others go on.
        let sum = brought(part.rank(), 200_000, Kind::Float);
        (0..5)
            .try_for_each(|_| part.all_reduce(vec![sum.shallow_clone()], ReduceOp::Max)?.wait())?;
        part.barrier()
    });
    ends.into_iter().for_each(|end| end.unwrap());
}
