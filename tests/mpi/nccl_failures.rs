//! Worlds of NCCL that fail end in time, each with its code and its reason; the switches of the
//! double make them.

use std::time::Duration;

use fm_dist::collective::{Collective, Limits, ReduceOp};
use fm_dist::error::{Error, Result};
use tch::Kind;

use super::nccl::{doubled, join_by_nccl, leave};
use crate::contract::{brought, sliced};
use crate::worlds::{FAILS_NOW, Outcome, end_with};

/// Short enough to wait for in a test, long enough for a busy machine to join a world.
const SHORT: Limits = Limits {
    init: Duration::from_secs(5),
    operation: Duration::from_secs(3),
    abort: Duration::from_secs(1),
};

/// From the start of a world that fails to its end: joining it, the longest limit, the abort, and a
/// busy machine.
const IN_TIME: Duration = Duration::from_secs(30);

/// A world of two that fails as its switches say ends in time, with this code, and tells why.
fn fails(switches: &[(&str, &str)], program: &str, code: i32, words: &[&str]) {
    fails_among(2, switches, program, code, words);
}

fn fails_among(ranks: usize, switches: &[(&str, &str)], program: &str, code: i32, words: &[&str]) {
    let Outcome { code: found, output, survived } = doubled(ranks, switches, program);
    assert_eq!(found, Some(code), "{output}");
    assert!(words.iter().all(|word| output.contains(word)), "{output}");
    assert!(!output.contains("ended well"), "{output}");
    let survived = survived.expect("the ranks said that they fail");
    assert!(survived < IN_TIME, "the world lived on for {survived:?}");
}

pub fn rank_of_a_world_that_fails() {
    println!("{FAILS_NOW}");
    let world = join_by_nccl(SHORT);
    let error = (0..5).find_map(|_| sum_once(&world.1).err());
    let Some(error) = error else {
        // What failed on one rank only must end this one too.
        world.0.barrier().unwrap_or_else(|error| end_with(&error));
        println!("rank {} ended well", world.1.rank());
        return leave(world);
    };
    stays_given_up(&world.1);
    end_with(&error)
}

fn sum_once(world: &dyn Collective) -> Result<()> {
    world.all_reduce(vec![brought(world.rank(), 1000, Kind::Float)], ReduceOp::Sum)?.wait()
}

/// After an error every call says so at once.
fn stays_given_up(world: &dyn Collective) {
    let buffer = || brought(0, 2, Kind::Float);
    let whole = || brought(0, 2 * world.world_size() as i64, Kind::Float);
    let refusals: [Result<()>; 6] = [
        world.all_reduce(vec![buffer()], ReduceOp::Sum).map(drop),
        world.reduce_scatter(vec![sliced(&buffer(), &whole())], ReduceOp::Sum).map(drop),
        world.all_gather(vec![sliced(&buffer(), &whole())]).map(drop),
        world.broadcast(buffer(), 0).map(drop),
        world.barrier(),
        world.split(0).map(drop),
    ];
    for refusal in refusals {
        let error = refusal.expect_err("the communicator is given up");
        assert!(matches!(error, Error::Collective { backend: "nccl", .. }), "{error}");
        assert!(error.to_string().contains("given up after an earlier error"), "{error}");
    }
    world.spent();
}

#[test]
fn an_error_that_one_rank_alone_is_told_ends_the_world() {
    let words = [
        "nccl all_reduce: rank 1/2: asynchronous error: remote process exited",
        "; under way for 0.",
        " s: all_reduce of 4000 bytes (operation 2 of its world)",
    ];
    fails(
        &[("NCCL_DOUBLE_LATE_ERROR", "1:2")],
        "mpi::nccl_failures::rank_of_a_world_that_fails",
        22,
        &words,
    );
}

#[test]
fn a_launch_that_fails_ends_the_world() {
    let words = [
        "nccl all_reduce: rank 0/2: all_reduce of 4000 bytes (operation 1 of its world): ",
        "unhandled system error",
    ];
    fails(
        &[("NCCL_DOUBLE_ERROR", "0:1")],
        "mpi::nccl_failures::rank_of_a_world_that_fails",
        22,
        &words,
    );
}

#[test]
fn a_kernel_that_broke_is_an_error_of_the_device_wherever_it_is_noticed() {
    let words = [
        "rank 1/2: ",
        "an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS, code 700)",
    ];
    fails(
        &[("NCCL_DOUBLE_DEVICE_ERROR", "1:1")],
        "mpi::nccl_failures::rank_of_a_world_that_fails",
        23,
        &words,
    );
}

#[test]
fn peers_that_never_come_together_are_given_up() {
    let words = ["nccl connect: rank ", "NCCL is still in progress after 5.0 s"];
    fails(
        &[("NCCL_DOUBLE_STUCK_INIT", "1")],
        "mpi::nccl_failures::rank_of_a_world_that_fails",
        22,
        &words,
    );
}

#[test]
fn an_operation_that_never_starts_is_given_up() {
    let words = [
        "nccl all_reduce: rank 0/1: all_reduce of 4000 bytes (operation 1 of its world): NCCL is still in progress after 3.0 s",
    ];
    fails_among(
        1,
        &[("NCCL_DOUBLE_STUCK_OPERATION", "0:1")],
        "mpi::nccl_failures::rank_of_a_world_that_fails",
        22,
        &words,
    );
}

#[test]
fn c16_an_abort_that_hangs_is_left_behind() {
    let switches = [("NCCL_DOUBLE_LATE_ERROR", "0:0"), ("NCCL_DOUBLE_ABORT_HANGS", "1")];
    let words = [
        "nccl all_reduce: rank 0/2: ",
        "WARN",
        "ncclCommAbort has not returned after 1.0 s and is left behind",
    ];
    fails(&switches, "mpi::nccl_failures::rank_of_a_world_that_fails", 22, &words);
}

#[test]
fn a_machine_whose_driver_finds_no_gpu_is_refused() {
    let words = ["cuInit: no CUDA-capable device is detected (CUDA_ERROR_NO_DEVICE, code 100)"];
    fails(
        &[("NCCL_DOUBLE_GPUS", "0")],
        "mpi::nccl_failures::rank_of_a_world_that_fails",
        52,
        &words,
    );
}

#[test]
fn a11_fewer_gpus_than_ranks_are_refused() {
    let words = ["2 ranks run on host ", "(ranks [0, 1]) and its driver shows 1 GPUs"];
    fails(
        &[("NCCL_DOUBLE_GPUS", "1")],
        "mpi::nccl_failures::rank_of_a_world_that_fails",
        52,
        &words,
    );
}

#[test]
fn a11_two_ranks_on_one_gpu_are_refused() {
    fails(
        &[("NCCL_DOUBLE_SAME_GPU", "1")],
        "mpi::nccl_failures::rank_of_a_world_that_fails",
        52,
        &["ranks 0 and 1 both took GPU "],
    );
}

#[test]
fn a_peer_that_never_comes_is_noticed_at_the_wait() {
    let words = [
        "nccl all_reduce: rank 0/2: all_reduce of 4000 bytes (operation 0 of its world)",
        "is not over after 3.",
    ];
    fails(&[], "mpi::nccl_failures::rank_whose_peer_never_comes", 22, &words);
}

pub fn rank_whose_peer_never_comes() {
    alone(|world| sum_once(world).expect_err("the peer never comes"));
}

#[test]
fn a_work_that_nobody_waits_for_is_noticed_by_later_calls() {
    let words = [
        "nccl all_reduce: rank 0/2: all_reduce of 4000 bytes (operation 0 of its world) is not over after 3.",
    ];
    fails(&[], "mpi::nccl_failures::rank_that_does_not_wait", 22, &words);
}

pub fn rank_that_does_not_wait() {
    alone(|world| {
        let _under_way = world
            .all_reduce(vec![brought(0, 1000, Kind::Float)], ReduceOp::Sum)
            .expect("a sound call");
        let nothing = || world.all_reduce(Vec::new(), ReduceOp::Sum).map(drop);
        std::iter::repeat_with(nothing).find_map(Result::err).expect("it goes on until an error")
    });
}

#[test]
fn a_rank_that_leaves_early_does_not_wait_for_its_peers() {
    let words = [
        "step 7: the loss is not finite",
        "NCCL could not take leave of its peers: NCCL is still in progress after 1.0 s",
    ];
    fails(&[], "mpi::nccl_failures::rank_that_leaves_early", 41, &words);
}

pub fn rank_that_leaves_early() {
    let (_control, nccl) =
        join_by_nccl(Limits { abort: Duration::from_secs(1), ..Limits::default() });
    println!("{FAILS_NOW}");
    if nccl.rank() == 0 {
        let waited = sum_once(&nccl);
        println!("rank 0 ended well: {waited:?}");
    }
    drop(nccl);
    end_with(&Error::NotFinite { step: 7, what: "the loss is not finite".into() });
}

/// Rank 0 fails as `fails` does while rank 1 does nothing at all.
fn alone(fails: fn(&dyn Collective) -> Error) {
    let world = join_by_nccl(SHORT);
    println!("{FAILS_NOW}");
    if world.1.rank() == 1 {
        std::thread::park();
    }
    end_with(&fails(&world.1))
}
