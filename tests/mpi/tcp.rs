//! Processes meet over TCP without a launcher's help, keep the contract of the collectives, and end
//! together.

use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use fm_dist::collective::{self, Collective, Launch, ReduceOp, Work};
use fm_dist::error::{BUG, Error};
use fm_dist::run::Resume;
use tch::Kind;
use tempfile::TempDir;

use crate::contract::{brought, contract};
use crate::fast::tcp::free_address;
use crate::programs;
use crate::runs::{checkpoint, finish, program, tiny, train_in_threads, with_sets};
use crate::worlds::{end_all_on_panic, end_with};

/// No world of this file takes as long, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// One of the [`programs`] as ranks of their own: exit code and output of each.
fn processes(world_size: usize, program: &str) -> Vec<(Option<i32>, String)> {
    let address = free_address();
    let start = |rank: usize| {
        let mut command = Command::new("timeout");
        command.arg(LIMIT.as_secs().to_string()).arg(std::env::current_exe().unwrap());
        command.args(programs::arguments(program)).env("OMP_NUM_THREADS", "1");
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .envs(place_of(rank, world_size, &address))
            .spawn()
            .unwrap()
    };
    let ranks: Vec<_> = (0..world_size)
        .map(start)
        .map(|child| thread::spawn(move || child.wait_with_output().unwrap()))
        .collect();
    let ends = ranks.into_iter().map(|rank| rank.join().unwrap());
    ends.map(|end| {
        (end.status.code(), String::from_utf8_lossy(&[end.stdout, end.stderr].concat()).into())
    })
    .collect()
}

fn place_of(rank: usize, world_size: usize, address: &str) -> [(&'static str, String); 3] {
    [
        ("FM_DIST_RANK", rank.to_string()),
        ("FM_DIST_WORLD_SIZE", world_size.to_string()),
        ("FM_DIST_RENDEZVOUS", address.into()),
    ]
}

/// Joins the world of [`processes`]; an error or a panic of this rank ends all ranks, as it does in
/// `main`.
fn join_the_world() -> Box<dyn Collective> {
    let world = collective::connect(Launch::Tcp, Duration::from_secs(60));
    end_all_on_panic();
    world.unwrap_or_else(|error| end_with(&error))
}

#[test]
fn processes_keep_the_contract_over_tcp() {
    for world_size in [2, 4] {
        for (rank, (code, output)) in
            processes(world_size, "mpi::tcp::rank_of_the_contract").into_iter().enumerate()
        {
            assert_eq!(code, Some(0), "{output}");
            assert!(output.contains(&format!("rank {rank}/{world_size} host")), "{output}");
        }
    }
}

pub fn rank_of_the_contract() {
    let world = join_the_world();
    contract(&*world).unwrap_or_else(|error| end_with(&error));
    println!("{} kept the contract", fm_dist::pulse::whereabouts());
    collective::finish(world).unwrap_or_else(|error| end_with(&error));
    assert!(!mpi::is_initialized());
}

/// The others wait for rank 1 in an all-reduce while it fails in its own way.
fn world_in_which_rank_1(fails: fn()) {
    let world = join_the_world();
    world.barrier().unwrap_or_else(|error| end_with(&error));
    if world.rank() == 1 {
        // An early return gives the world up before it is ended.
        drop(world);
        fails();
        return;
    }
    let waited = world
        .all_reduce(vec![brought(0, 1 << 20, Kind::Float)], ReduceOp::Sum)
        .and_then(Work::wait);
    end_with(&waited.unwrap_err());
}

fn all_end_with(program: &str, code: i32) -> Vec<String> {
    let began = Instant::now();
    let ends = processes(3, program);
    assert!(began.elapsed() < LIMIT / 2, "{:?}", began.elapsed());
    assert!(ends.iter().all(|(found, _)| *found == Some(code)), "{ends:?}");
    ends.into_iter().map(|(_, output)| output).collect()
}

#[test]
fn an_error_on_one_rank_ends_all_with_its_code() {
    let outputs = all_end_with("mpi::tcp::rank_of_a_world_with_an_error", 41);
    assert!(outputs[1].contains("step 7: the loss is not finite"), "{outputs:?}");
    // Of each other whoever hears of it first says so to the rest.
    assert!(outputs[0].contains("ended the run with exit code 41"), "{outputs:?}");
    assert!([0, 2].iter().any(|rank| outputs[*rank].contains("rank 1 (host ")), "{outputs:?}");
}

pub fn rank_of_a_world_with_an_error() {
    world_in_which_rank_1(|| {
        end_with(&Error::NotFinite { step: 7, what: "the loss is not finite".into() })
    });
}

#[test]
fn a_panic_on_one_rank_ends_all() {
    all_end_with("mpi::tcp::rank_of_a_world_with_a_panic", BUG);
}

pub fn rank_of_a_world_with_a_panic() {
    world_in_which_rank_1(|| panic!("an invariant is broken"));
}

#[test]
fn a_rank_that_dies_without_a_word_is_named() {
    let ends = processes(2, "mpi::tcp::rank_of_a_world_with_a_crash");
    assert_eq!(ends[0].0, Some(22), "{ends:?}");
    assert!(
        ends[0].1.contains("tcp all_reduce: rank 1 (host ")
            && ends[0].1.contains("closed its connection"),
        "{ends:?}"
    );
}

pub fn rank_of_a_world_with_a_crash() {
    world_in_which_rank_1(|| std::process::abort());
}

#[test]
fn another_thread_ends_all_while_the_main_thread_waits() {
    let outputs = all_end_with("mpi::tcp::rank_of_a_world_with_a_watchdog", 21);
    assert!(
        !outputs[0].contains("rank 2"),
        "what follows from the end is no reason of its own: {outputs:?}"
    );
    assert!(
        [1, 2].iter().all(|rank| outputs[*rank].contains("ended the run with exit code 21")),
        "{outputs:?}"
    );
}

pub fn rank_of_a_world_with_a_watchdog() {
    let world = join_the_world();
    world.barrier().unwrap_or_else(|error| end_with(&error));
    // Nobody rings: the time-outs are the watchdog's verdict, and the time that rank 1 computes
    // while the others wait for it.
    let (_ring, bell) = mpsc::channel::<()>();
    match world.rank() {
        0 => drop(thread::spawn(move || {
            assert!(bell.recv_timeout(Duration::from_millis(300)).is_err());
            collective::abort(21);
        })),
        1 => assert!(bell.recv_timeout(Duration::from_secs(5)).is_err()),
        _ => (),
    }
    // The first one's data have all been sent when rank 1 comes; it hears in the second one that
    // the others are gone.
    let sum =
        || world.all_reduce(vec![brought(0, 3, Kind::Float)], ReduceOp::Sum).and_then(Work::wait);
    let waited = sum().and_then(|()| sum());
    end_with(&waited.unwrap_err());
}

#[test]
fn training_over_tcp_writes_the_bytes_of_training_in_threads() {
    let root = TempDir::new().unwrap();
    let output = |name: &str| format!("output_dir={}", root.path().join(name).display());
    let in_threads =
        train_in_threads(&tiny(&["max_steps=6", &output("threads")]), &Resume::Never, 2).unwrap();
    let (address, own) = (free_address(), output("tcp"));
    let start = |rank: usize| {
        let mut command =
            program(&with_sets(&["train", "--launch", "tcp"], &["max_steps=6", &own]));
        command.envs(place_of(rank, 2, &address)).env("OMP_NUM_THREADS", "1");
        thread::spawn(move || finish(command))
    };
    let ranks = [start(0), start(1)];
    for (code, _, errors) in ranks.map(|rank| rank.join().unwrap()) {
        assert_eq!(code, 0, "{errors}");
    }
    let folders =
        std::fs::read_dir(root.path().join("tcp")).unwrap().map(|entry| entry.unwrap().path());
    let over_tcp =
        folders.filter(|path| path.is_dir()).find(|path| path.join("step-00000006").exists());
    assert_eq!(
        checkpoint(&in_threads, 6),
        checkpoint(&over_tcp.unwrap_or_else(|| root.path().join("tcp")), 6)
    );
}

#[test]
fn an_error_that_all_know_of_is_said_once_over_tcp() {
    let address = free_address();
    let start = |rank: usize| {
        let mut command = program(&["train", "--launch", "tcp", "--set", "max_steps=0"]);
        command.envs(place_of(rank, 2, &address));
        thread::spawn(move || finish(command))
    };
    let ends = [start(0), start(1)].map(|rank| rank.join().unwrap());
    assert_eq!((ends[0].0, ends[1].0), (50, 50), "{ends:?}");
    assert!(
        ends[0].2.contains("error CONFIG rank 0/2") && !ends[1].2.contains("fm-dist: error"),
        "{ends:?}"
    );
}

#[test]
fn an_error_that_all_meet_is_said_by_one_over_tcp() {
    let (address, root) = (free_address(), TempDir::new().unwrap());
    let own = format!("output_dir={}", root.path().join("run").display());
    let start = |rank: usize| {
        let sets =
            ["train.global_batch_size=24", "debug.inject_fault=\"error@every:2:forward\"", &own];
        let mut command = program(&with_sets(&["train", "--launch", "tcp"], &sets));
        command.envs(place_of(rank, 3, &address)).env("OMP_NUM_THREADS", "1");
        thread::spawn(move || finish(command))
    };
    let ends = [start(0), start(1), start(2)].map(|rank| rank.join().unwrap());
    assert!(ends.iter().all(|(code, ..)| *code == 52), "{ends:?}");
    assert_eq!(
        ends.iter().filter(|(.., errors)| errors.contains("fm-dist: error")).count(),
        1,
        "{ends:?}"
    );
}

#[test]
fn a_launch_over_tcp_says_what_to_set() {
    let (code, _, errors) = finish(program(&["train", "--launch", "tcp"]));
    assert_eq!(code, 52, "{errors}");
    assert!(
        errors.contains("start it with srun, or set FM_DIST_RANK for each process"),
        "{errors}"
    );
}
