//! Programs that tests start as processes of their own, most of them as ranks of a world.
//!
//! A program is a function beside its tests and a line in the list below. The test binary itself
//! runs it: where the only test is the one of this file and a program's name follows, that test is
//! the program. So a program is built whenever its tests are, goes wherever their binary goes, is
//! never started by `--ignored`, and needs no second binary that is linked with libtorch.

use crate::{cuda, mpi};

/// Stands before a program's name among the arguments: the test harness takes it for the name of
/// one more test, which does not exist.
const MARK: &str = "program=";

macro_rules! programs {
    ($($program:path,)*) => {
        const PROGRAMS: &[(&str, fn())] = &[$((stringify!($program), $program)),*];
    };
}

programs! {
    cuda::failures::process_whose_kernel_fails,
    cuda::failures::process_whose_memory_runs_out,
    cuda::rank_of_the_contract,
    cuda::rank_that_computes_around_collectives,
    mpi::attention::rank_that_tries,
    mpi::collectives::rank_of_a_world_at_different_operations,
    mpi::collectives::rank_of_a_world_that_disagrees,
    mpi::collectives::rank_of_a_world_with_a_panic,
    mpi::collectives::rank_of_a_world_with_a_watchdog,
    mpi::collectives::rank_of_a_world_with_an_error,
    mpi::collectives::rank_of_the_contract_by_messages,
    mpi::collectives::rank_of_the_mpi_contract,
    mpi::copies::process_that_copies,
    mpi::copies::process_that_copies_from_anywhere,
    mpi::copies::process_that_lets_a_copy_go,
    mpi::kernels::process_that_is_refused,
    mpi::kernels::process_whose_gpu_fails,
    mpi::kernels::process_with_the_kernel,
    mpi::operations::process_beside_a_cpu,
    mpi::operations::process_that_verifies,
    mpi::operations::process_with_odd_shapes,
    mpi::nccl::process_with_the_real_nccl,
    mpi::nccl::rank_of_many_works,
    mpi::nccl::rank_of_the_contract,
    mpi::nccl_failures::rank_of_a_world_that_fails,
    mpi::nccl_failures::rank_that_does_not_wait,
    mpi::nccl_failures::rank_that_leaves_early,
    mpi::nccl_failures::rank_whose_peer_never_comes,
    mpi::tcp::rank_of_a_world_with_a_crash,
    mpi::tcp::rank_of_a_world_with_a_panic,
    mpi::tcp::rank_of_a_world_with_a_watchdog,
    mpi::tcp::rank_of_a_world_with_an_error,
    mpi::tcp::rank_of_the_contract,
}

fn find(name: &str) -> fn() {
    let mut found = PROGRAMS.iter().filter(|(listed, _)| *listed == name);
    match (found.next(), found.next()) {
        (Some((_, program)), None) => *program,
        (None, _) => panic!("no program `{name}`: tests/programs.rs lists all"),
        (Some(_), Some(_)) => panic!("two programs `{name}` in tests/programs.rs"),
    }
}

/// Arguments with which this binary is a program instead of tests.
///
/// # Panics
/// If no program has this name.
pub fn arguments(name: &str) -> [String; 5] {
    find(name);
    let test = "programs::a_program_is_found_by_its_name_alone";
    let program = format!("{MARK}{name}");
    ["--exact", test, &program, "--nocapture", "--test-threads=1"].map(String::from)
}

/// In a process that was started with [`arguments`], the program.
#[test]
fn a_program_is_found_by_its_name_alone() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(name) = arguments.iter().find_map(|argument| argument.strip_prefix(MARK)) {
        return find(name)();
    }
    for (name, program) in PROGRAMS {
        assert!(std::ptr::fn_addr_eq(find(name), *program), "{name}");
    }
    std::panic::catch_unwind(|| find("mpi::nobody")).expect_err("nobody has this name");
}
