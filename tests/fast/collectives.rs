//! Every backend that needs no process of its own keeps the contract of the collectives: a world of
//! one, and worlds of threads.

use std::time::Duration;

use fm_dist::collective::{self, Collective, Launch, ReduceOp, Solo, Threads};
use fm_dist::error::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::contract::{brought, contract, expected};

#[test]
fn a_world_of_one_keeps_the_contract() {
    contract(&Solo).expect("no peer can fail");
}

#[test]
fn worlds_of_threads_keep_the_contract() {
    for world_size in 1..=4 {
        Threads::run(world_size, |rank| contract(rank).expect("no rank fails"));
    }
}

#[test]
fn a_thread_rank_that_leaves_early_is_named_to_the_others() {
    let errors = Threads::run(3, |rank| if rank.rank() == 1 { None } else { rank.barrier().err() });
    assert!(errors[1].is_none());
    for rank in [0, 2] {
        let error = errors[rank].as_ref().expect("the barrier cannot be passed");
        assert!(matches!(error, Error::Collective { operation: "barrier", .. }), "{error}");
        assert!(error.to_string().contains("rank 1 is gone"), "{error}");
    }
}

#[test]
fn what_a_rank_posted_before_it_left_still_arrives() {
    let buffers = [0, 1].map(|rank| brought(rank, 10, Kind::Float));
    let mut ranks = Threads::world(2);
    let work = |rank: &Threads| {
        let buffer = buffers[rank.rank()].shallow_clone();
        rank.all_reduce(vec![buffer], ReduceOp::Sum).expect("a sound call")
    };
    let works: Vec<_> = ranks.iter().map(work).collect();
    ranks.clear();
    works.into_iter().for_each(|work| work.wait().expect("both had posted"));
    let sum = expected(2, 10, Kind::Float, ReduceOp::Sum);
    assert!(buffers.iter().all(|buffer| buffer.equal(&sum)));
}

/// Rank 1 panics while the others wait for it.
#[test]
fn a_thread_rank_that_panics_ends_the_others_and_is_shown_first_with_its_message() {
    let world = || {
        Threads::run(3, |rank| {
            assert!(rank.rank() != 1, "an invariant of rank 1 is broken");
            rank.barrier().expect("all ranks come")
        })
    };
    let panic = std::panic::catch_unwind(world).expect_err("a rank panics");
    let text = panic.downcast_ref::<String>().expect("a text");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[0], "rank 1 panicked: an invariant of rank 1 is broken");
    for rank in ["rank 0 panicked: all ranks come", "rank 2 panicked: all ranks come"] {
        assert!(lines[1..].iter().any(|line| line.starts_with(rank)), "{text}");
    }
    assert!(lines[1..].iter().all(|line| line.contains("rank 1 is gone")), "{text}");
}

#[test]
fn thread_ranks_that_disagree_are_told_of_both_calls() {
    fn floats(size: i64) -> Tensor {
        Tensor::zeros([size], (Kind::Float, Device::Cpu))
    }
    type Start = fn(&Threads, Tensor) -> Result<collective::Work>;
    type Bring = fn() -> Tensor;
    let sum: Start = |rank, buffer| rank.all_reduce(vec![buffer], ReduceOp::Sum);
    let max: Start = |rank, buffer| rank.all_reduce(vec![buffer], ReduceOp::Max);
    let broadcast: Start = |rank, buffer| rank.broadcast(buffer, 0);
    let three: Bring = || floats(3);
    let four: Bring = || floats(4);
    let integers: Bring = || brought(0, 3, Kind::Int64);
    let cases = [
        (
            [(sum, three), (sum, four)],
            [
                "rank 1 is at all_reduce#1 (Sum of 4 Float)",
                "rank 0 at all_reduce#1 (Sum of 3 Float)",
            ],
        ),
        ([(sum, three), (max, three)], ["Sum of", "Max of"]),
        ([(sum, three), (broadcast, three)], ["all_reduce", "broadcast#1 (3 Float from rank 0)"]),
        ([(sum, three), (sum, integers)], ["3 Float", "3 Int64"]),
    ];
    for (calls, words) in cases {
        let errors = Threads::run(2, |rank| {
            let (start, bring) = calls[rank.rank()];
            start(rank, bring()).and_then(collective::Work::wait).expect_err("the ranks disagree")
        });
        for error in errors {
            assert!(matches!(error, Error::Desync { .. }), "{error}");
            let error = error.to_string();
            assert!(
                error.contains("ranks disagree") && words.iter().all(|word| error.contains(word)),
                "{error}"
            );
        }
    }
}

#[test]
fn without_a_launcher_mpi_is_never_initialized() {
    let world = collective::connect(Launch::Auto, Duration::from_secs(60))
        .expect("no launcher started this test");
    assert_eq!((world.rank(), world.world_size()), (0, 1));
    assert!(!mpi::is_initialized());
    collective::finish(world).expect("a world of one");
    assert!(!mpi::is_initialized());
}
