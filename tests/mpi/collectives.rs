//! Real MPI keeps the contract of the collectives, and a rank that fails ends its world.

use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use fm_dist::collective::{self, Collective, Mpi, ReduceOp};
use fm_dist::error::{BUG, Error};
use mpi::collective::CommunicatorCollectives;
use mpi::topology::SimpleCommunicator;
use tch::Kind;

use crate::contract::{brought, contract, sliced};
use crate::worlds::{
    FAILS_NOW, Outcome, end_all_on_panic, end_with, join_the_world, run, world_of,
};

/// How long a world may outlive a rank that fails: 5 s are promised, and a busy machine may take
/// four times as long.
const SOON: Duration = Duration::from_secs(20);

fn mpirun(ranks: usize, program: &str) -> Outcome {
    run(world_of(ranks), program)
}

#[test]
fn worlds_of_mpi_ranks_keep_the_contract() {
    for ranks in [2, 3, 4] {
        let Outcome { code, output, .. } =
            mpirun(ranks, "mpi::collectives::rank_of_the_mpi_contract");
        assert_eq!(code, Some(0), "{output}");
        for rank in 0..ranks {
            assert!(
                output.contains(&format!("rank {rank} of {ranks} kept the contract")),
                "{output}"
            );
        }
    }
}

/// As between machines: messages alone.
#[test]
fn worlds_without_shared_memory_keep_the_contract() {
    for ranks in [2, 4] {
        let Outcome { code, output, .. } =
            mpirun(ranks, "mpi::collectives::rank_of_the_contract_by_messages");
        assert_eq!(code, Some(0), "{output}");
        assert_eq!(output.matches("kept the contract by messages").count(), ranks, "{output}");
    }
}

pub fn rank_of_the_contract_by_messages() {
    end_all_on_panic();
    let world = Mpi::connect().unwrap_or_else(|error| end_with(&error)).by_messages();
    contract(&world).unwrap_or_else(|error| end_with(&error));
    println!("rank {} kept the contract by messages", world.rank());
    collective::finish(Box::new(world)).unwrap_or_else(|error| end_with(&error));
}

pub fn rank_of_the_mpi_contract() {
    let world = join_the_world();
    contract(&*world).unwrap_or_else(|error| end_with(&error));
    let full = brought(0, 2 * world.world_size() as i64, Kind::Float);
    let foreign = full.narrow(0, 2 * ((world.rank() + 1) % world.world_size()) as i64, 2);
    let error = world
        .all_gather(vec![sliced(&foreign, &full)])
        .err()
        .expect("its peers' places are not its own");
    assert!(error.to_string().contains("another place than this rank's slice"), "{error}");
    println!("rank {} of {} kept the contract", world.rank(), world.world_size());
    collective::finish(world).unwrap_or_else(|error| end_with(&error));
}

/// Rank 1 fails in its own way while the others wait for it in an all-reduce.
fn world_in_which_rank_1(fails: fn()) {
    let world = join_the_world();
    world.barrier().unwrap_or_else(|error| end_with(&error));
    if world.rank() == 1 {
        println!("{FAILS_NOW}");
        fails();
    }
    let waited = world
        .all_reduce(vec![brought(0, 1 << 20, Kind::Float)], ReduceOp::Sum)
        .and_then(collective::Work::wait);
    println!("rank {} left the all-reduce: {waited:?}", world.rank());
}

fn ends_in_time(test: &str, code: i32) -> String {
    let outcome = mpirun(2, test);
    assert_eq!(outcome.code, Some(code), "{}", outcome.output);
    let survived = outcome.survived.expect("rank 1 said that it fails");
    assert!(survived < SOON, "the world lived on for {survived:?}");
    assert!(!outcome.output.contains("left the all-reduce"), "{}", outcome.output);
    outcome.output
}

#[test]
fn an_error_on_one_rank_ends_the_world_with_its_code() {
    let output = ends_in_time("mpi::collectives::rank_of_a_world_with_an_error", 41);
    assert!(output.contains("step 7: the loss is not finite"), "{output}");
}

pub fn rank_of_a_world_with_an_error() {
    world_in_which_rank_1(|| {
        end_with(&Error::NotFinite { step: 7, what: "the loss is not finite".into() })
    });
}

#[test]
fn a_panic_on_one_rank_ends_the_world_soon() {
    let output = ends_in_time("mpi::collectives::rank_of_a_world_with_a_panic", BUG);
    assert!(output.contains("an invariant is broken"), "{output}");
}

pub fn rank_of_a_world_with_a_panic() {
    world_in_which_rank_1(|| panic!("an invariant is broken"));
}

#[test]
fn another_thread_ends_a_world_whose_main_thread_waits() {
    ends_in_time("mpi::collectives::rank_of_a_world_with_a_watchdog", 21);
}

pub fn rank_of_a_world_with_a_watchdog() {
    let world = join_the_world();
    world.barrier().unwrap_or_else(|error| end_with(&error));
    if world.rank() == 1 {
        thread::park();
    }
    let (ring, bell) = mpsc::channel::<()>();
    thread::spawn(move || {
        // Nobody rings while the main thread waits below: the time-out is the watchdog's verdict.
        assert!(bell.recv_timeout(Duration::from_millis(300)).is_err());
        println!("{FAILS_NOW}");
        collective::abort(21);
    });
    let waited = world
        .all_reduce(vec![brought(0, 3, Kind::Float)], ReduceOp::Sum)
        .and_then(collective::Work::wait);
    println!("left the all-reduce: {waited:?} {:?}", ring.send(()));
}

#[test]
fn ranks_of_mpi_that_disagree_each_say_what_arrived_instead() {
    let Outcome { code, output, .. } =
        mpirun(2, "mpi::collectives::rank_of_a_world_that_disagrees");
    assert_eq!(code, Some(42), "{output}");
    // MPI itself takes a message that is too short for whole.
    let (ten, twenty) = ("all_reduce#1 (Sum of 10 Float)", "all_reduce#1 (Sum of 20 Float)");
    let texts = [
        &format!(
            "ranks disagree: rank 1 sent 80 bytes of another operation, rank 0 is at {ten} and expected 40"
        ),
        &format!(
            "ranks disagree: rank 0 sent 40 bytes of another operation, rank 1 is at {twenty} and expected 80"
        ),
        "mpi broadcast: an earlier operation failed: ranks disagree",
    ];
    assert!(texts.iter().all(|text| output.contains(text)), "{output}");
}

pub fn rank_of_a_world_that_disagrees() {
    let world = join_the_world();
    let buffer = brought(0, 10 * (1 + world.rank() as i64), Kind::Float);
    let error = world
        .all_reduce(vec![buffer], ReduceOp::Sum)
        .and_then(collective::Work::wait)
        .expect_err("the ranks disagree");
    let later = world
        .broadcast(brought(0, 10, Kind::Float), 0)
        .and_then(collective::Work::wait)
        .expect_err("nothing is in step");
    eprintln!("{error}\n{later}");
    // Each has said what it saw before one ends the world.
    SimpleCommunicator::world().barrier();
    end_with(&error);
}

/// Ranks that disagree about what a message of equal size means.
#[test]
fn ranks_of_mpi_that_disagree_about_an_operation_end_with_a_code_of_its_own() {
    let Outcome { code, output, .. } =
        mpirun(2, "mpi::collectives::rank_of_a_world_at_different_operations");
    assert_eq!(code, Some(42), "{output}");
    assert!(output.contains("sent 4096 bytes of another operation, rank"), "{output}");
    assert!(output.contains("of 1024 Float) and expected 4096"), "{output}");
}

pub fn rank_of_a_world_at_different_operations() {
    let world = join_the_world();
    let op = if world.rank() == 0 { ReduceOp::Min } else { ReduceOp::Max };
    let result =
        world.all_reduce(vec![brought(0, 1024, Kind::Float)], op).and_then(collective::Work::wait);
    end_with(&result.expect_err("the ranks disagree"));
}

/// Row A7 of the fault matrix, by each launcher's variables.
#[test]
fn a7_a_launcher_whose_tasks_do_not_find_each_other_is_refused() {
    let launchers: [&[(&str, &str)]; 3] = [
        &[("OMPI_COMM_WORLD_SIZE", "8")],
        &[("PMI_SIZE", "8")],
        &[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0")],
    ];
    for variables in launchers {
        let mut command = Command::new(std::env::current_exe().expect("this binary has a path"));
        command.envs(variables.iter().copied());
        let Outcome { code, output, .. } =
            run(command, "mpi::collectives::rank_of_the_mpi_contract");
        assert_eq!(code, Some(52), "{variables:?}: {output}");
        assert!(output.contains("launcher says 8 tasks, "), "{output}");
        assert!(
            output.contains(": wrong --mpi= plugin? try srun --mpi=pmix or mpirun"),
            "{output}"
        );
    }
}
