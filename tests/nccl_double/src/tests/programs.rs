//! Programs that tests start once a rank. The test binary itself runs one: where the only test is
//! the one of this file and a program's name follows, that test is the program.

use super::{broken, failing, kernels, sound, switched};

/// Name and body.
pub type Program = (&'static str, fn());

/// Stands before a program's name among the arguments: the test harness takes it for the name of
/// one more test, which does not exist.
const MARK: &str = "program=";

macro_rules! programs {
    ($($program:path,)*) => {
        const PROGRAMS: &[Program] = &[$((stringify!($program), $program)),*];
    };
}

programs! {
    failing::a_kernel_that_fails,
    failing::a_launch_without_memory,
    failing::a_load_that_fails,
    failing::an_operation_of_rank_1,
    failing::errors_of_memory,
    kernels::program,
    sound::a_large_buffer,
    sound::a_maker_of_ids,
    sound::all_operations,
    sound::an_early_reader,
    switched::a_communicator_in_progress_for_ever,
    switched::a_delayed_operation,
    switched::a_launch_after_an_error,
    switched::a_rank_that_is_gone,
    switched::an_abort_beside_the_main_thread,
    switched::an_operation_that_is_queried,
    switched::no_gpu,
    switched::one_gpu_for_two,
    switched::the_second_launch_of_rank_1,
    switched::three_gpus,
    switched::two_streams,
}

fn find(name: &str) -> fn() {
    let broken = [
        broken::DISAGREE,
        broken::MISUSE_MEMORY,
        broken::BLOCK,
        broken::OUTLIVE,
        broken::LAUNCH_WRONGLY,
    ];
    let mut all = broken.into_iter().chain([PROGRAMS]).flatten();
    let found = all.find(|(listed, _)| *listed == name);
    found.unwrap_or_else(|| panic!("no program `{name}`: tests/programs.rs lists all")).1
}

/// Arguments with which this binary is a program instead of tests.
///
/// # Panics
/// If no program has this name.
pub fn arguments(name: &str) -> [String; 5] {
    find(name);
    let test = "tests::programs::a_program_is_found_by_its_name_alone";
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
    std::panic::catch_unwind(|| find("broken::nobody")).expect_err("nobody has this name");
}
