//! The functions of NVML that tell of a GPU's faults, without rules: a program may ask what it
//! likes. GPUs are counted from the last one, so that an ordinal of the driver finds a wrong one.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cuda::pci_bus_id;
use crate::device;
use crate::switches::switches;

pub type NvmlResult = c_uint;

const SUCCESS: NvmlResult = 0;
const NOT_FOUND: NvmlResult = 6;
const TIMEOUT: NvmlResult = 10;

const UNCORRECTED: c_uint = 1;
const VOLATILE: c_uint = 0;
const XID_CRITICAL: c_ulonglong = 8;
const REMAPPED_PENDING: c_uint = 144;
/// A field's value is an `unsigned int`.
const UNSIGNED: c_uint = 1;

/// A field that is asked for, and its answer.
#[repr(C)]
pub struct FieldValue {
    field: c_uint,
    scope: c_uint,
    timestamp: i64,
    latency: i64,
    kind: c_uint,
    result: NvmlResult,
    value: u64,
}

/// An event that has happened.
#[repr(C)]
pub struct EventData {
    device: *mut c_void,
    kind: c_ulonglong,
    pub data: c_ulonglong,
    instances: [c_uint; 2],
}

static REGISTERED: AtomicBool = AtomicBool::new(false);

/// Handles are no addresses.
fn handle(ordinal: usize) -> *mut c_void {
    (switches().num_gpus - ordinal) as *mut c_void
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> NvmlResult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> NvmlResult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByPciBusId_v2(
    id: *const c_char,
    device: *mut *mut c_void,
) -> NvmlResult {
    let id = unsafe { CStr::from_ptr(id) }.to_string_lossy();
    let Some(ordinal) = (0..switches().num_gpus).find(|ordinal| pci_bus_id(*ordinal) == id) else {
        return NOT_FOUND;
    };
    unsafe { device.write(handle(ordinal)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    _: *mut c_void,
    kind: c_uint,
    counter: c_uint,
    count: *mut c_ulonglong,
) -> NvmlResult {
    while switches().nvml_hangs {
        std::thread::park();
    }
    let is_counted = (kind, counter) == (UNCORRECTED, VOLATILE);
    unsafe { count.write(if is_counted { switches().ecc_errors } else { 0 }) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(
    _: *mut c_void,
    count: c_int,
    values: *mut FieldValue,
) -> NvmlResult {
    // A row with uncorrected errors is replaced at the next reset.
    let pending = u64::from(switches().ecc_errors > 0);
    for value in unsafe { std::slice::from_raw_parts_mut(values, count as usize) } {
        value.kind = UNSIGNED;
        value.result = SUCCESS;
        value.value = if value.field == REMAPPED_PENDING { pending } else { 0 };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetCreate(set: *mut *mut c_void) -> NvmlResult {
    unsafe { set.write(std::ptr::dangling_mut::<u8>().cast()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceRegisterEvents(
    device: *mut c_void,
    kinds: c_ulonglong,
    _: *mut c_void,
) -> NvmlResult {
    let is_ours = kinds & XID_CRITICAL != 0 && device == handle(0);
    REGISTERED.store(is_ours && device::failed().is_none(), Ordering::Relaxed);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetWait_v2(
    _: *mut c_void,
    data: *mut EventData,
    _: c_uint,
) -> NvmlResult {
    let Some(xid) = switches().xid.filter(|_| device::failed().is_some()) else { return TIMEOUT };
    // Each event is told once.
    if !REGISTERED.swap(false, Ordering::Relaxed) {
        return TIMEOUT;
    }
    let event = EventData { device: handle(0), kind: XID_CRITICAL, data: xid, instances: [0; 2] };
    unsafe { data.write(event) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlEventSetFree(_: *mut c_void) -> NvmlResult {
    SUCCESS
}
