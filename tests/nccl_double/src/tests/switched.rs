//! Each switch does what the crate's head says.

use std::ptr::null_mut;
use std::time::{Duration, Instant};

use super::rank::*;
use crate::cuda::*;
use crate::nccl::*;

const SYSTEM_ERROR: u32 = 2;
const INVALID_USAGE: u32 = 5;
const REMOTE_ERROR: u32 = 6;

#[test]
fn a_delayed_operation_is_not_ready_at_once_and_its_events_tell_the_delay() {
    let delay = [("NCCL_DOUBLE_DELAY_MS", "1000")];
    expect_success(&launch(2, "switched::a_delayed_operation", &delay));
}

pub fn a_delayed_operation() {
    let rank = Rank::start();
    let (begin, began) = (new_event(), Instant::now());
    cuEventRecord(begin, null_mut());
    let mut buffer = [1.0; 4];
    let end = rank.start_all_reduce(&mut buffer);
    assert_eq!(cuEventQuery(end), NOT_READY);
    assert_eq!(cuStreamQuery(rank.stream), NOT_READY);
    assert_eq!(cuStreamWaitEvent(null_mut(), end, 0), 0);
    assert_eq!((cuEventQuery(end), cuStreamQuery(rank.stream)), (0, 0));
    assert!(began.elapsed() >= Duration::from_millis(1000));
    let mut milliseconds = 0.0;
    assert_eq!(unsafe { cuEventElapsedTime_v2(&mut milliseconds, begin, end) }, 0);
    assert!(milliseconds >= 1000.0, "{milliseconds}");
    assert_eq!(buffer, [2.0; 4]);
    [begin, end].into_iter().for_each(|event| _ = cuEventDestroy_v2(event));
    rank.end();
}

#[test]
fn queries_alone_bring_an_operation_to_its_end() {
    expect_success(&launch(
        2,
        "switched::an_operation_that_is_queried",
        &[("NCCL_DOUBLE_DELAY_MS", "5")],
    ));
}

pub fn an_operation_that_is_queried() {
    let rank = Rank::start();
    let mut buffer = [1.0; 4];
    let end = rank.start_all_reduce(&mut buffer);
    while cuEventQuery(end) == NOT_READY {
        std::thread::yield_now();
    }
    assert_eq!(buffer, [2.0; 4]);
    wait(end);
    rank.end();
}

/// Each seed is one order of the ends of two streams; both soon occur, on a busy machine later.
#[test]
fn the_shuffle_changes_which_stream_ends_first() {
    let is_second_first = |seed: usize| {
        let ends =
            launch(1, "switched::two_streams", &[("NCCL_DOUBLE_SHUFFLE", &format!("{seed}"))]);
        expect_success(&ends);
        ends[0].output.contains("the second stream ends first")
    };
    let first = is_second_first(0);
    assert!((1..200).any(|seed| is_second_first(seed) != first), "always {first}");
}

pub fn two_streams() {
    let one = Rank::start();
    let two = Rank { stream: new_stream(), world: one.communicator(1), ..one };
    let (mut a, mut b) = ([1.0; 4], [1.0; 4]);
    let (first, second) = (one.start_all_reduce(&mut a), two.start_all_reduce(&mut b));
    for event in [first, second] {
        cuStreamWaitEvent(null_mut(), event, 0);
    }
    let mut milliseconds = 0.0;
    unsafe { cuEventElapsedTime_v2(&mut milliseconds, first, second) };
    println!("the {} stream ends first", if milliseconds < 0.0 { "second" } else { "first" });
    [first, second].into_iter().for_each(|event| _ = cuEventDestroy_v2(event));
    one.end();
    two.end();
}

/// What polls come to within a while that would do many times over: none is in progress for ever.
fn outcome(communicator: *mut std::ffi::c_void) -> Option<u32> {
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(200) {
        match poll(communicator) {
            IN_PROGRESS => std::thread::yield_now(),
            error => return Some(error),
        }
    }
    None
}

#[test]
fn a_rank_that_never_joins_keeps_all_in_progress() {
    expect_success(&launch(
        2,
        "switched::a_communicator_in_progress_for_ever",
        &[("NCCL_DOUBLE_STUCK_INIT", "1")],
    ));
}

pub fn a_communicator_in_progress_for_ever() {
    let rank = Rank::without_communicator();
    let mut communicator = null_mut();
    let (ranks, own) = (rank.ranks as i32, rank.rank as i32);
    unsafe { ncclCommInitRankConfig(&mut communicator, ranks, rank.id(0), own, &mut config(0)) };
    assert_eq!(outcome(communicator), None);
    ncclCommAbort(communicator);
    cuStreamDestroy_v2(rank.stream);
}

#[test]
fn an_operation_can_be_in_progress_for_ever_on_one_rank() {
    let ends = launch(
        2,
        "switched::the_second_launch_of_rank_1",
        &[("NCCL_DOUBLE_STUCK_OPERATION", "1:1")],
    );
    assert!(ends[1].output.contains("in progress for ever"), "{ends:#?}");
    expect_success(&ends);
}

#[test]
fn the_launch_of_an_operation_can_report_an_error_on_one_rank() {
    let ends = launch(2, "switched::the_second_launch_of_rank_1", &[("NCCL_DOUBLE_ERROR", "1:1")]);
    assert!(ends[1].output.contains(&format!("the launch ended in {SYSTEM_ERROR}")), "{ends:#?}");
    expect_success(&ends);
}

#[test]
fn an_error_can_come_after_a_launch_that_succeeded() {
    let ends =
        launch(2, "switched::the_second_launch_of_rank_1", &[("NCCL_DOUBLE_LATE_ERROR", "1:1")]);
    assert!(
        ends[1].output.contains(&format!("the launch ended in 0, the next poll in {REMOTE_ERROR}")),
        "{ends:#?}"
    );
    expect_success(&ends);
}

pub fn the_second_launch_of_rank_1() {
    let rank = Rank::start();
    let mut buffer = [1.0; 4];
    wait(rank.start_all_reduce(&mut buffer));
    rank.computed();
    rank.all_reduce(&mut buffer);
    if rank.rank == 1 {
        match outcome(rank.world) {
            None => println!("in progress for ever"),
            Some(error) => {
                println!("the launch ended in {error}, the next poll in {}", poll(rank.world))
            }
        }
    }
    // What was launched and lost is forgotten with the communicator.
    assert_eq!(ncclCommAbort(rank.world), 0);
    cuStreamDestroy_v2(rank.stream);
}

#[test]
fn a_communicator_with_an_error_can_only_be_aborted() {
    let ends = launch(1, "switched::a_launch_after_an_error", &[("NCCL_DOUBLE_ERROR", "0:0")]);
    expect_broken(
        &ends,
        "all_reduce: communicator 1 is used after its error 2; only an abort may follow",
    );
}

pub fn a_launch_after_an_error() {
    let rank = Rank::start();
    rank.computed();
    rank.all_reduce(&mut [1.0; 4]);
    assert_eq!(settle(rank.world), SYSTEM_ERROR);
    rank.all_reduce(&mut [1.0; 4]);
}

#[test]
fn an_abort_can_hang() {
    let ends =
        launch(1, "switched::an_abort_beside_the_main_thread", &[("NCCL_DOUBLE_ABORT_HANGS", "1")]);
    assert_eq!(ends[0].code, Some(22), "{ends:#?}");
    expect_success(&launch(1, "switched::an_abort_beside_the_main_thread", &[]));
}

pub fn an_abort_beside_the_main_thread() {
    let rank = Rank::start();
    let world = rank.world as usize;
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        ncclCommAbort(std::ptr::with_exposed_provenance_mut(world));
        done.send(())
    });
    let hangs = std::env::var_os("NCCL_DOUBLE_ABORT_HANGS").is_some();
    if ended.recv_timeout(Duration::from_millis(if hangs { 300 } else { 20_000 })).is_err() {
        // With an event, a stream and a communicator alive: an exit with a failure leaks nothing.
        new_event();
        std::process::exit(22);
    }
    cuStreamDestroy_v2(rank.stream);
}

#[test]
fn there_are_as_many_gpus_as_asked_for() {
    expect_success(&launch(1, "switched::three_gpus", &[("NCCL_DOUBLE_GPUS", "3")]));
}

pub fn three_gpus() {
    let (mut count, mut device, mut version) = (0, 0, 0);
    assert_eq!(unsafe { cuDeviceGetCount(&mut count) }, 3_u32, "not initialized");
    assert_eq!(cuInit(0), 0);
    assert_eq!(unsafe { cuDeviceGetCount(&mut count) }, 0);
    assert_eq!(
        (count, unsafe { cuDeviceGet(&mut device, 2) }, unsafe { cuDeviceGet(&mut device, 3) }),
        (3, 0, 101)
    );
    assert_eq!((unsafe { ncclGetVersion(&mut version) }, version), (0, 22_907));
    let mut uuids = [[0; 16]; 3];
    for (device, uuid) in uuids.iter_mut().enumerate() {
        assert_eq!(unsafe { cuDeviceGetUuid_v2(uuid, device as i32) }, 0);
    }
    assert!(uuids[0] != uuids[1] && uuids[1] != uuids[2]);
    assert_eq!(unsafe { cuEventCreate(&mut null_mut(), 0) }, 201, "no current context");
}

#[test]
fn without_a_gpu_cuda_does_not_start() {
    expect_success(&launch(1, "switched::no_gpu", &[("NCCL_DOUBLE_GPUS", "0")]));
}

pub fn no_gpu() {
    assert_eq!(cuInit(0), 100);
}

#[test]
fn ranks_on_one_gpu_get_no_communicator() {
    expect_success(&launch(2, "switched::one_gpu_for_two", &[("NCCL_DOUBLE_SAME_GPU", "1")]));
}

pub fn one_gpu_for_two() {
    let rank = Rank::without_communicator();
    let mut communicator = null_mut();
    unsafe {
        ncclCommInitRankConfig(&mut communicator, 2, rank.id(0), rank.rank as i32, &mut config(0))
    };
    assert_eq!(settle(communicator), INVALID_USAGE);
    let text = unsafe { std::ffi::CStr::from_ptr(ncclGetLastError(communicator)) };
    assert!(text.to_str().unwrap().starts_with("Duplicate GPU detected"), "{text:?}");
    ncclCommAbort(communicator);
    cuStreamDestroy_v2(rank.stream);
}

#[test]
fn patience_with_a_rank_that_is_gone_ends() {
    let ends = launch(2, "switched::a_rank_that_is_gone", &[("NCCL_DOUBLE_PATIENCE_MS", "300")]);
    expect_broken(
        &ends,
        "operation 0 (all_reduce sum of 4 f32) has waited 0.3 s for rank 1 (its process is gone)",
    );
}

pub fn a_rank_that_is_gone() {
    let rank = Rank::start();
    if rank.rank == 1 {
        std::process::abort();
    }
    wait(rank.start_all_reduce(&mut [1.0; 4]));
}

#[test]
fn a_switch_that_is_misspelled_is_refused() {
    expect_broken(
        &launch(1, "switched::no_gpu", &[("NCCL_DOUBLE_DELAY", "3")]),
        "there is no switch NCCL_DOUBLE_DELAY",
    );
    expect_broken(
        &launch(1, "switched::no_gpu", &[("NCCL_DOUBLE_ERROR", "3")]),
        "NCCL_DOUBLE_ERROR=\"3\" cannot be read",
    );
}
