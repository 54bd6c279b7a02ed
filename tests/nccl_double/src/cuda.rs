//! The CUDA driver's functions. The compute stream, handle null, is the program itself: what it is
//! given is done at once.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::device;
use crate::failure::fail;
use crate::hope::Patience;
use crate::module::{Function, MOST_BLOCK_BYTES, Module, USUAL_BLOCK_BYTES, on_host};
use crate::switches::switches;
use crate::world::{Event, Stream, world};

pub type CuResult = u32;

pub const SUCCESS: CuResult = 0;
pub const INVALID_VALUE: CuResult = 1;
pub const OUT_OF_MEMORY: CuResult = 2;
const NOT_INITIALIZED: CuResult = 3;
const NO_DEVICE: CuResult = 100;
const INVALID_DEVICE: CuResult = 101;
const INVALID_IMAGE: CuResult = 200;
pub const INVALID_CONTEXT: CuResult = 201;
const NO_BINARY_FOR_GPU: CuResult = 209;
const INVALID_HANDLE: CuResult = 400;
const NOT_FOUND: CuResult = 500;
const NOT_READY: CuResult = 600;
pub const ILLEGAL_ADDRESS: CuResult = 700;
const ILLEGAL_INSTRUCTION: CuResult = 715;
const LAUNCH_FAILED: CuResult = 719;

/// Memory of a GPU, and how much of it is free.
const TOTAL_BYTES: usize = 80 << 30;
const FREE_BYTES: usize = 512 << 20;

/// Driver version of CUDA 13.0.
const DRIVER_VERSION: c_int = 13_000;
const NON_BLOCKING: c_uint = 1;
const DISABLE_TIMING: c_uint = 2;
/// CUDA's other name of the null stream.
const LEGACY_STREAM: usize = 1;
/// What stands in front of a context's handle; the device's ordinal follows.
const CONTEXT: usize = 0xcc << 32;

static INITIALIZED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static DEVICE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Ordinal of the GPU whose context is this thread's current one.
pub fn current_device() -> Option<usize> {
    DEVICE.get()
}

/// What GPU an ordinal stands for: one for all where the switch says so.
pub fn identity(device: usize) -> usize {
    if switches().same_gpu { 0 } else { device }
}

fn initialized(otherwise: impl FnOnce() -> CuResult) -> CuResult {
    if INITIALIZED.load(Ordering::Relaxed) { otherwise() } else { NOT_INITIALIZED }
}

/// Where a GPU sits.
pub fn pci_bus_id(ordinal: usize) -> String {
    format!("0000:{:02x}:00.0", 16 + ordinal)
}

fn is_device(device: c_int) -> bool {
    usize::try_from(device).is_ok_and(|device| device < switches().num_gpus)
}

fn compute_or(stream: *mut c_void) -> usize {
    if stream as usize == LEGACY_STREAM { 0 } else { stream as usize }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> CuResult {
    crate::leaks::watch();
    if flags != 0 {
        return INVALID_VALUE;
    }
    if switches().num_gpus == 0 {
        return NO_DEVICE;
    }
    INITIALIZED.store(true, Ordering::Relaxed);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> CuResult {
    unsafe { version.write(DRIVER_VERSION) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> CuResult {
    initialized(|| {
        unsafe { count.write(switches().num_gpus as c_int) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> CuResult {
    initialized(|| {
        if !is_device(ordinal) {
            return INVALID_DEVICE;
        }
        unsafe { device.write(ordinal) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(
    name: *mut c_char,
    length: c_int,
    device: c_int,
) -> CuResult {
    if !is_device(device) {
        return INVALID_DEVICE;
    }
    let text = b"NCCL contract double\0";
    if (length as usize) < text.len() {
        return INVALID_VALUE;
    }
    unsafe { name.copy_from_nonoverlapping(text.as_ptr().cast(), text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> CuResult {
    if !is_device(device) {
        return INVALID_DEVICE;
    }
    let mut bytes = *b"nccl-double-GPU\0";
    bytes[15] = identity(device as usize) as u8;
    unsafe { uuid.write(bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(
    id: *mut c_char,
    length: c_int,
    device: c_int,
) -> CuResult {
    if !is_device(device) {
        return INVALID_DEVICE;
    }
    let text = pci_bus_id(device as usize) + "\0";
    if (length as usize) < text.len() {
        return INVALID_VALUE;
    }
    unsafe { id.copy_from_nonoverlapping(text.as_ptr().cast(), text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CuResult {
    if current_device().is_none() {
        return INVALID_CONTEXT;
    }
    if let Some(error) = device::failed() {
        return error;
    }
    unsafe { (free.write(FREE_BYTES), total.write(TOTAL_BYTES)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_uint,
    device: c_int,
) -> CuResult {
    const PROCESSORS: c_uint = 16;
    const MAJOR: c_uint = 75;
    const MINOR: c_uint = 76;
    if !is_device(device) {
        return INVALID_DEVICE;
    }
    let architecture = switches().architecture as c_int;
    let answer = match attribute {
        // Few, so that threads go round.
        PROCESSORS => 2,
        MAJOR => architecture / 10,
        MINOR => architecture % 10,
        _ => fail(format!("cuDeviceGetAttribute: attribute {attribute} is not known here")),
    };
    unsafe { value.write(answer) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(
    context: *mut *mut c_void,
    device: c_int,
) -> CuResult {
    initialized(|| {
        if !is_device(device) {
            return INVALID_DEVICE;
        }
        unsafe { context.write((CONTEXT | device as usize) as *mut c_void) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> CuResult {
    if is_device(device) { SUCCESS } else { INVALID_DEVICE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> CuResult {
    let device = (context as usize) ^ CONTEXT;
    if context.is_null() {
        DEVICE.set(None);
    } else if device < switches().num_gpus {
        DEVICE.set(Some(device));
    } else {
        fail(format!("cuCtxSetCurrent: {context:?} is no context"));
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, flags: c_uint) -> CuResult {
    if current_device().is_none() {
        return INVALID_CONTEXT;
    }
    if flags != NON_BLOCKING {
        fail(format!(
            "cuStreamCreate: with flags {flags} the stream takes turns with the compute stream; 1 (non-blocking) is expected"
        ));
    }
    let handle = world().streams.add(Stream::default());
    unsafe { stream.write(handle as *mut c_void) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> CuResult {
    const NAME: &str = "cuStreamDestroy";
    let (mut world, stream) = (world(), stream as usize);
    world.check_settled(stream, NAME);
    world.advance(stream, u64::MAX);
    let title = world.streams.title(stream);
    // What an abort left is forgotten with its communicator.
    if world.streams.get(stream, NAME).has_work() {
        fail(format!("{NAME}: {title} has work that is not done"));
    }
    if let Some(what) = world.unobserved(Some(stream)) {
        fail(format!("{NAME}: {what}"));
    }
    world.streams.remove(stream, NAME);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: *mut c_void) -> CuResult {
    let (mut world, stream) = (world(), compute_or(stream));
    if stream == 0 {
        return SUCCESS;
    }
    world.check_settled(stream, "cuStreamQuery");
    world.advance(stream, u64::MAX);
    if world.streams.get(stream, "cuStreamQuery").is_done() { SUCCESS } else { NOT_READY }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(
    stream: *mut c_void,
    event: *mut c_void,
    flags: c_uint,
) -> CuResult {
    const NAME: &str = "cuStreamWaitEvent";
    if flags != 0 {
        return INVALID_VALUE;
    }
    if let Some(error) = device::failed() {
        return error;
    }
    let (stream, mut world_now) = (compute_or(stream), world());
    let title = world_now.events.title(event as usize);
    let Some(mark) = world_now.events.get(event as usize, NAME).mark.clone() else {
        fail(format!("{NAME}: {title} was never recorded, so the wait waits for nothing"))
    };
    if stream != 0 {
        world_now.check_settled(stream, NAME);
        world_now.wait(stream, mark, NAME);
        return SUCCESS;
    }
    drop(world_now);
    let mut patience = Patience::new();
    loop {
        let mut world = world();
        world.advance(mark.stream, mark.position);
        if mark.passed().is_some() {
            world.stop_waiting();
            world.observe(&mark);
            return SUCCESS;
        }
        world.check_hope(mark.stream, &patience);
        drop(world);
        patience.pause();
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, flags: c_uint) -> CuResult {
    if current_device().is_none() {
        return INVALID_CONTEXT;
    }
    if flags & !DISABLE_TIMING != 0 {
        fail(format!(
            "cuEventCreate: flags {flags} are neither 0 nor 2 (no timing); an event of other flags may block the host"
        ));
    }
    let handle = world().events.add(Event { timed: flags & DISABLE_TIMING == 0, mark: None });
    unsafe { event.write(handle as *mut c_void) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> CuResult {
    const NAME: &str = "cuEventRecord";
    if let Some(error) = device::failed() {
        return error;
    }
    let (mut world, stream) = (world(), compute_or(stream));
    if stream != 0 {
        world.check_settled(stream, NAME);
    }
    let mark = world.mark(stream, NAME);
    world.events.get(event as usize, NAME).mark = Some(mark);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: *mut c_void) -> CuResult {
    if let Some(error) = device::failed() {
        return error;
    }
    let mut world = world();
    // CUDA answers so for an event that was never recorded.
    let Some(mark) = world.events.get(event as usize, "cuEventQuery").mark.clone() else {
        return SUCCESS;
    };
    world.advance(mark.stream, mark.position);
    if mark.passed().is_some() { SUCCESS } else { NOT_READY }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(
    milliseconds: *mut f32,
    start: *mut c_void,
    end: *mut c_void,
) -> CuResult {
    let mut world = world();
    let mut times = [0; 2];
    for (time, event) in times.iter_mut().zip([start, end]) {
        let event = world.events.get(event as usize, "cuEventElapsedTime");
        let Some(mark) = event.mark.clone().filter(|_| event.timed) else { return INVALID_HANDLE };
        world.advance(mark.stream, mark.position);
        let Some(passed) = mark.passed() else { return NOT_READY };
        *time = passed;
    }
    unsafe { milliseconds.write((times[1] as f64 - times[0] as f64) as f32 / 1e6) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(
    milliseconds: *mut f32,
    start: *mut c_void,
    end: *mut c_void,
) -> CuResult {
    unsafe { cuEventElapsedTime(milliseconds, start, end) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> CuResult {
    world().events.remove(event as usize, "cuEventDestroy");
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(
    module: *mut *mut c_void,
    image: *const c_void,
) -> CuResult {
    let Some(device) = current_device() else { return INVALID_CONTEXT };
    if let Some(error) = device::failed().or(switches().load_error) {
        return error;
    }
    let Some(read) = (unsafe { Module::read(image) }) else { return INVALID_IMAGE };
    if !read.runs_on(switches().architecture) {
        return NO_BINARY_FOR_GPU;
    }
    let handle = world().modules.add((device, read));
    unsafe { module.write(handle as *mut c_void) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: *mut c_void) -> CuResult {
    let (mut world, module) = (world(), module as usize);
    world.modules.remove(module, "cuModuleUnload");
    let gone: Vec<usize> = world
        .functions
        .iter()
        .filter(|(_, function)| function.module == module)
        .map(|(handle, _)| handle)
        .collect();
    gone.into_iter().for_each(|function| drop(world.functions.remove(function, "cuModuleUnload")));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> CuResult {
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    let (mut world, module) = (world(), module as usize);
    let (_, loaded) = world.modules.get(module, "cuModuleGetFunction");
    let Some(parameters) = loaded.kernels.get(&name).cloned() else { return NOT_FOUND };
    let handle = world.functions.add(Function {
        module,
        name,
        parameters,
        most_block_bytes: USUAL_BLOCK_BYTES,
    });
    unsafe { function.write(handle as *mut c_void) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetParamInfo(
    function: *mut c_void,
    number: usize,
    offset: *mut usize,
    size: *mut usize,
) -> CuResult {
    let mut world = world();
    let parameters = &world.functions.get(function as usize, "cuFuncGetParamInfo").parameters;
    let Some(found) = parameters.get(number) else { return INVALID_VALUE };
    // Parameters of up to eight bytes are aligned to their size, larger ones hold nothing larger
    // than eight bytes.
    let place = |end: usize, size: &usize| end.next_multiple_of((*size).min(8)) + size;
    unsafe { offset.write(parameters[..=number].iter().fold(0, place) - found) };
    unsafe { size.write(*found) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(
    function: *mut c_void,
    attribute: c_uint,
    value: c_int,
) -> CuResult {
    const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_uint = 8;
    if attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES {
        fail(format!("cuFuncSetAttribute: attribute {attribute} is not known here"));
    }
    if !(0..=MOST_BLOCK_BYTES as c_int).contains(&value) {
        return INVALID_VALUE;
    }
    let mut world = world();
    world.functions.get(function as usize, "cuFuncSetAttribute").most_block_bytes = value as c_uint;
    SUCCESS
}

/// Runs at once what the compute stream is given, as everything there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    blocks_x: c_uint,
    blocks_y: c_uint,
    blocks_z: c_uint,
    threads_x: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared_bytes: c_uint,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> CuResult {
    const NAME: &str = "cuLaunchKernel";
    let mut world_now = world();
    let Function { module, name, parameters, most_block_bytes } =
        world_now.functions.get(function as usize, NAME).clone();
    let (device, _) = world_now.modules.get(module, NAME);
    if current_device() != Some(*device) {
        fail(format!(
            "{NAME}: {name} was loaded for GPU {device}, and {:?} is current",
            current_device()
        ));
    }
    drop(world_now);
    if compute_or(stream) != 0 {
        fail(format!(
            "{NAME}: {name} runs beside the compute stream, where libtorch's memory may change hands meanwhile"
        ));
    }
    if [blocks_y, blocks_z, threads_y, threads_z] != [1; 4] || !extra.is_null() {
        fail(format!(
            "{NAME}: {name} with more than one axis or extra arguments is not known here"
        ));
    }
    if !(1..1 << 31).contains(&blocks_x)
        || !(1..=1024).contains(&threads_x)
        || shared_bytes > most_block_bytes
    {
        return INVALID_VALUE;
    }
    if let Some(error) = device::failed().or_else(device::count_launch) {
        return error;
    }
    let addresses = unsafe { std::slice::from_raw_parts(arguments, parameters.len()) };
    let mut copies: Vec<Vec<u64>> =
        parameters.iter().map(|size| vec![0; size.div_ceil(8)]).collect();
    for ((number, size), copy) in parameters.iter().enumerate().zip(&mut copies) {
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(copy.as_mut_ptr().cast::<u8>(), *size) };
        if !crate::memory::read(addresses[number] as usize, bytes) {
            fail(format!("{NAME}: argument {number} of {name} is not readable for {size} bytes"));
        }
    }
    let mut addresses: Vec<*mut c_void> =
        copies.iter_mut().map(|copy| copy.as_mut_ptr().cast()).collect();
    let kernel = on_host(&name);
    // It runs on one thread at a time, as on the stream.
    static STREAM: Mutex<()> = Mutex::new(());
    let _turn = STREAM.lock().unwrap_or_else(PoisonError::into_inner);
    unsafe { kernel(blocks_x, threads_x, shared_bytes, addresses.as_mut_ptr()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: CuResult, text: *mut *const c_char) -> CuResult {
    let Some((name, _)) = describe(error) else { return INVALID_VALUE };
    unsafe { text.write(name.as_ptr()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: CuResult, text: *mut *const c_char) -> CuResult {
    let Some((_, what)) = describe(error) else { return INVALID_VALUE };
    unsafe { text.write(what.as_ptr()) };
    SUCCESS
}

fn describe(error: CuResult) -> Option<(&'static CStr, &'static CStr)> {
    match error {
        SUCCESS => Some((c"CUDA_SUCCESS", c"no error")),
        INVALID_VALUE => Some((c"CUDA_ERROR_INVALID_VALUE", c"invalid argument")),
        OUT_OF_MEMORY => Some((c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory")),
        ILLEGAL_ADDRESS => {
            Some((c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"))
        }
        ILLEGAL_INSTRUCTION => {
            Some((c"CUDA_ERROR_ILLEGAL_INSTRUCTION", c"an illegal instruction was encountered"))
        }
        LAUNCH_FAILED => Some((c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure")),
        NOT_INITIALIZED => Some((c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error")),
        NO_DEVICE => Some((c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected")),
        INVALID_DEVICE => Some((c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal")),
        INVALID_IMAGE => Some((c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid")),
        INVALID_CONTEXT => Some((c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context")),
        NO_BINARY_FOR_GPU => Some((
            c"CUDA_ERROR_NO_BINARY_FOR_GPU",
            c"no kernel image is available for execution on the device",
        )),
        INVALID_HANDLE => Some((c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle")),
        NOT_FOUND => Some((c"CUDA_ERROR_NOT_FOUND", c"named symbol not found")),
        NOT_READY => Some((c"CUDA_ERROR_NOT_READY", c"device not ready")),
        _ => None,
    }
}

/// Functions that make the host wait for the GPU, where a dead peer would hold it for ever.
macro_rules! blocking {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> CuResult {
            fail(concat!(stringify!($name), " blocks the host"))
        }
    )* };
}

blocking! { cuStreamSynchronize cuEventSynchronize cuCtxSynchronize cuCtxSynchronize_v2 }
