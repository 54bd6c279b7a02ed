//! GPUs that fail when a switch says so, and what NVML tells of them.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

use super::kernels::{image, kernel, load, run};
use super::rank::*;
use crate::cuda::*;
use crate::nccl::ncclCommAbort;
use crate::nvml::*;

const NVML_TIMEOUT: u32 = 10;
const XID_CRITICAL: u64 = 8;

/// Launches the kernel with nothing to compute with: a launch that fails reads no memory.
fn launch_kernel(function: *mut c_void) -> u32 {
    let (mut number, mut floats) = (0i64, [0f32; 3]);
    let mut start = &raw mut number;
    let number = &raw mut number;
    run(
        function,
        [1, 1, 0],
        null_mut(),
        [(&raw mut start).cast(), number.cast(), floats.as_mut_ptr().cast()],
    )
}

fn memory() -> (u32, usize) {
    let (mut free, mut total) = (0, 0);
    (unsafe { cuMemGetInfo_v2(&mut free, &mut total) }, total - free)
}

#[test]
fn a_kernel_that_fails_leaves_nothing_that_works() {
    let switches = [("NCCL_DOUBLE_KERNEL_ERROR", "0:719"), ("NCCL_DOUBLE_XID", "79")];
    expect_success(&launch(1, "failing::a_kernel_that_fails", &switches));
}

pub fn a_kernel_that_fails() {
    let rank = Rank::without_communicator();
    let event = new_event();
    assert_eq!(cuEventRecord(event, null_mut()), 0);
    let set = registered(0);
    assert_eq!((xid(set), memory().0), (Err(NVML_TIMEOUT), 0));
    let (module, function) = kernel();
    assert_eq!([launch_kernel(function), launch_kernel(function)], [719; 2]);
    assert_eq!([cuEventRecord(event, null_mut()), cuEventQuery(event), memory().0], [719; 3]);
    assert_eq!(load(&image(90)).0, 719);
    assert_eq!([xid(set), xid(set)], [Ok(79), Err(NVML_TIMEOUT)]);
    cuEventDestroy_v2(event);
    cuModuleUnload(module);
    cuStreamDestroy_v2(rank.stream);
}

#[test]
fn memory_that_runs_out_is_told_once() {
    expect_success(&launch(
        1,
        "failing::a_launch_without_memory",
        &[("NCCL_DOUBLE_KERNEL_ERROR", "0:2")],
    ));
}

pub fn a_launch_without_memory() {
    let rank = Rank::without_communicator();
    let (module, function) = kernel();
    assert_eq!(launch_kernel(function), OUT_OF_MEMORY);
    let (code, used) = memory();
    assert!(code == 0 && used > 0);
    cuModuleUnload(module);
    cuStreamDestroy_v2(rank.stream);
}

#[test]
fn a_module_that_cannot_be_loaded_is_told() {
    expect_success(&launch(1, "failing::a_load_that_fails", &[("NCCL_DOUBLE_LOAD_ERROR", "2")]));
}

pub fn a_load_that_fails() {
    let rank = Rank::without_communicator();
    assert_eq!(load(&image(90)).0, OUT_OF_MEMORY);
    cuStreamDestroy_v2(rank.stream);
}

#[test]
fn an_operation_can_break_the_gpu_of_one_rank() {
    let ends = launch(2, "failing::an_operation_of_rank_1", &[("NCCL_DOUBLE_DEVICE_ERROR", "1:0")]);
    expect_success(&ends);
}

pub fn an_operation_of_rank_1() {
    let rank = Rank::start();
    rank.computed();
    let event = new_event();
    rank.all_reduce(&mut [1.0; 4]);
    settle(rank.world);
    let expected = if rank.rank == 1 { ILLEGAL_ADDRESS } else { 0 };
    assert_eq!(cuEventRecord(event, rank.stream), expected);
    cuEventDestroy_v2(event);
    assert_eq!(ncclCommAbort(rank.world), 0);
    cuStreamDestroy_v2(rank.stream);
}

/// A set that waits for the critical errors of the GPU with this ordinal.
fn registered(ordinal: i32) -> *mut c_void {
    let mut set = null_mut();
    assert_eq!(unsafe { nvmlEventSetCreate(&mut set) }, 0);
    assert_eq!(nvmlDeviceRegisterEvents(found(ordinal), XID_CRITICAL, set), 0);
    set
}

/// The GPU with this ordinal as NVML knows it.
fn found(ordinal: i32) -> *mut c_void {
    let (mut id, mut device) = ([0; 32], null_mut());
    assert_eq!(unsafe { cuDeviceGetPCIBusId(id.as_mut_ptr(), 32, ordinal) }, 0);
    assert_eq!(unsafe { nvmlDeviceGetHandleByPciBusId_v2(id.as_ptr(), &mut device) }, 0);
    device
}

fn xid(set: *mut c_void) -> Result<u64, u32> {
    let mut event = MaybeUninit::<EventData>::uninit();
    match unsafe { nvmlEventSetWait_v2(set, event.as_mut_ptr(), 0) } {
        0 => Ok(unsafe { event.assume_init() }.data),
        code => Err(code),
    }
}

#[test]
fn nvml_counts_the_errors_that_a_switch_names() {
    expect_success(&launch(1, "failing::errors_of_memory", &[("NCCL_DOUBLE_ECC_ERRORS", "5")]));
}

pub fn errors_of_memory() {
    let rank = Rank::without_communicator();
    let count = |kind, counter| {
        let mut count = u64::MAX;
        let code = unsafe { nvmlDeviceGetTotalEccErrors(found(0), kind, counter, &mut count) };
        (code, count)
    };
    assert_eq!([count(1, 0), count(0, 0), count(1, 1)], [(0, 5), (0, 0), (0, 0)]);
    let mut unknown = null_mut();
    let nowhere =
        unsafe { nvmlDeviceGetHandleByPciBusId_v2(c"0000:00:00.0".as_ptr(), &mut unknown) };
    assert_eq!(nowhere, 6);
    cuStreamDestroy_v2(rank.stream);
}
