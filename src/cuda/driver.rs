//! The part of the CUDA driver that is needed: devices, streams and events, modules and their
//! functions. No call in here blocks.
//!
//! Only cudarc's raw layer is used: its safe layer synchronizes in places, and owns what libtorch
//! already owns.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::health::GpuMemory;
use super::{Outcome, text};

/// CUDA version that the wheel of libtorch 2.13 is built with, as 1000 times the major version.
const NEEDED_VERSION: c_int = 13_000;

/// A GPU and its primary context, which libtorch uses too.
pub struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
}

/// Checks that a driver is installed and new enough, initializes it, and returns the number of GPUs
/// that it shows to this process.
pub fn start() -> Outcome<usize> {
    // SAFETY: only opens libraries; a driver's initializers have no requirements.
    if !unsafe { sys::is_culib_present() } {
        return Err(
            "no CUDA driver is installed here: found neither libcuda.so nor libcuda.so.1".into()
        );
    }
    // SAFETY: the flags must be zero.
    check("cuInit", unsafe { sys::cuInit(0) })?;
    let mut version = 0;
    // SAFETY: the result is written to a live integer.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < NEEDED_VERSION {
        let words = |version: c_int| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(format!(
            "the NVIDIA driver speaks CUDA {}, {} is needed: update it",
            words(version),
            words(NEEDED_VERSION)
        ));
    }
    let mut count = 0;
    // SAFETY: the result is written to a live integer.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Returns an id that no other GPU has.
pub fn uuid(ordinal: usize) -> Outcome<String> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the driver returned the handle, and the result is written to a live variable.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, handle(ordinal)?) })?;
    Ok(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
}

/// Returns the GPU's place on the bus, e.g. `0000:65:00.0`.
pub fn pci_bus_id(ordinal: usize) -> Outcome<String> {
    let mut id: [c_char; 32] = [0; 32];
    // SAFETY: the driver returned the handle and writes a zero-terminated text of at most the given
    // length.
    check("cuDeviceGetPCIBusId", unsafe {
        sys::cuDeviceGetPCIBusId(id.as_mut_ptr(), id.len() as c_int, handle(ordinal)?)
    })?;
    // SAFETY: as above; `id` outlives the borrow.
    Ok(unsafe { CStr::from_ptr(id.as_ptr()) }.to_string_lossy().into_owned())
}

/// Returns the GPU's free memory and all of it.
pub fn memory(ordinal: usize) -> Outcome<GpuMemory> {
    let _current = Device::open(ordinal)?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: the device is current, and both results are written to live integers.
    check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
    Ok(GpuMemory { free: free as u64, total: total as u64 })
}

fn handle(ordinal: usize) -> Outcome<sys::CUdevice> {
    let mut handle = 0;
    // SAFETY: the driver is initialized, and the result is written to a live integer.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut handle, ordinal as c_int) })?;
    Ok(handle)
}

impl Device {
    /// Opens the GPU with this index and makes it current on this thread.
    pub fn open(ordinal: usize) -> Outcome<Self> {
        let handle = handle(ordinal)?;
        let mut context = null_mut();
        // SAFETY: the driver returned the handle, and the result is written to a live pointer.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, handle)
        })?;
        let device = Device { handle, context };
        device.make_current()?;
        Ok(device)
    }

    /// Makes this device current on this thread. libtorch uses the same context, unless a caller
    /// has changed the device.
    pub fn make_current(&self) -> Outcome<()> {
        // SAFETY: the context is retained.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Returns the vendor's name of the GPU.
    pub fn name(&self) -> Outcome<String> {
        let mut name: [c_char; 100] = [0; 100];
        // SAFETY: the driver writes a zero-terminated text of at most the given length.
        check("cuDeviceGetName", unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, self.handle)
        })?;
        // SAFETY: as above; `name` outlives the borrow.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// Returns the target of machine code for this GPU, e.g. `sm_90`.
    pub fn architecture(&self) -> Outcome<String> {
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok(format!("sm_{}{}", self.attribute(MAJOR)?, self.attribute(MINOR)?))
    }

    /// Returns the number of multiprocessors, which run blocks of threads concurrently.
    pub fn num_processors(&self) -> Outcome<u32> {
        let count =
            self.attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        u32::try_from(count).map_err(|_| format!("the driver counts {count} processors"))
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Outcome<c_int> {
        let mut value = 0;
        // SAFETY: the driver returned the handle, and the result is written to a live integer.
        check("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&mut value, attribute, self.handle)
        })?;
        Ok(value)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once and released once; streams and events of this device keep it alive
        // until they are dropped.
        log_error(check("cuDevicePrimaryCtxRelease", unsafe {
            sys::cuDevicePrimaryCtxRelease_v2(self.handle)
        }));
    }
}

/// A CUDA stream.
pub struct Stream {
    raw: sys::CUstream,
    device: Option<Rc<Device>>,
}

impl Stream {
    /// The stream in which libtorch computes: the legacy default stream of the current device.
    pub const COMPUTE: Stream = Stream { raw: null_mut(), device: None };

    /// Creates a stream that runs concurrently with the compute stream and is ordered with it only
    /// by events.
    pub fn new(device: &Rc<Device>) -> Outcome<Self> {
        let mut raw = null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the device is current, and the result is written to a live pointer.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Stream { raw, device: Some(device.clone()) })
    }

    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Makes work queued from here on wait for `event`.
    pub fn wait(&self, event: &Event) -> Outcome<()> {
        // SAFETY: both handles belong to the current device and are not destroyed.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) })
    }

    /// Records an event after all work queued so far.
    pub fn record(&self) -> Outcome<Event> {
        let event = Event::new()?;
        // SAFETY: both handles belong to the current device and are not destroyed.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.raw, self.raw) })?;
        Ok(event)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.is_some() {
            // SAFETY: created here and destroyed once; the driver frees the stream when its queued
            // work is complete.
            log_error(check("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(self.raw) }));
        }
    }
}

/// A point in a stream, with the time at which the device reached it.
pub struct Event {
    raw: sys::CUevent,
}

impl Event {
    fn new() -> Outcome<Self> {
        let mut raw = null_mut();
        let flags = sys::CUevent_flags_enum::CU_EVENT_DEFAULT as u32;
        // SAFETY: the device is current, and the result is written to a live pointer.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, flags) })?;
        Ok(Event { raw })
    }

    /// True if the device has reached the event.
    pub fn is_complete(&self) -> Outcome<bool> {
        // SAFETY: the event exists.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Time between two events that are complete.
    pub fn elapsed_since(&self, earlier: &Event) -> Outcome<Duration> {
        let mut milliseconds = 0.0;
        // SAFETY: both events exist, and the result is written to a live float.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.raw, self.raw)
        })?;
        // The resolution is documented as about half a microsecond, so two events that close
        // together may come out negative.
        Ok(Duration::try_from_secs_f64(f64::from(milliseconds) / 1e3).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created here and destroyed once; the driver keeps the event for work that waits
        // for it.
        log_error(check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.raw) }));
    }
}

/// Machine code in a device's memory.
pub struct Module {
    raw: sys::CUmodule,
    device: Device,
}

/// A kernel of a module.
pub struct Function {
    raw: sys::CUfunction,
    /// Bytes of each parameter, as the kernel's code expects them.
    parameters: Vec<usize>,
    module: Arc<Module>,
}

// SAFETY: the driver takes its handles from any thread whose current context is theirs; each
// function here that takes one makes it current.
unsafe impl Send for Module {}
// SAFETY: as above; nothing in here changes.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}
// SAFETY: as above; nothing in here changes.
unsafe impl Sync for Function {}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of memory that the threads of a block share.
    pub block_bytes: u32,
}

/// Bytes of a block's memory that a kernel gets without asking for more.
const USUAL_BLOCK_BYTES: u32 = 48 << 10;

impl Module {
    /// Loads an image of machine code for `device`.
    pub fn load(image: &[u8], device: Device) -> Outcome<Arc<Self>> {
        let mut raw = null_mut();
        // SAFETY: the device is current, the image contains its own length, the driver copies it,
        // and the result is written to a live pointer.
        check("cuModuleLoadData", unsafe {
            sys::cuModuleLoadData(&mut raw, image.as_ptr().cast())
        })?;
        Ok(Arc::new(Module { raw, device }))
    }

    /// Returns the kernel of this name.
    pub fn function(self: &Arc<Self>, name: &str) -> Outcome<Function> {
        self.device.make_current()?;
        let (mut raw, text) = (null_mut(), CString::new(name).expect("names have no zeros"));
        // SAFETY: the module is loaded, the name is zero-terminated, and the result is written to a
        // live pointer.
        check("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&mut raw, self.raw, text.as_ptr())
        })
        .map_err(|what| format!("{name}: {what}"))?;
        Ok(Function { raw, parameters: parameters(raw)?, module: self.clone() })
    }
}

impl Function {
    /// Launches the function in the compute stream, after all work that libtorch has queued.
    /// `arguments` are the address and the size of each argument; the driver copies them during the
    /// call.
    ///
    /// # Panics
    /// If the sizes differ from those of the kernel's parameters (a bug in the caller).
    ///
    /// # Safety
    /// The kernel must access only memory that stays allocated for it until the stream has
    /// completed it.
    pub unsafe fn launch(&self, grid: Grid, arguments: &[(*const c_void, usize)]) -> Outcome<()> {
        let sizes: Vec<usize> = arguments.iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, self.parameters, "bytes of the arguments and of the kernel's parameters");
        self.module.device.make_current()?;
        if grid.block_bytes > USUAL_BLOCK_BYTES {
            self.allow_block_bytes(grid.block_bytes)?;
        }
        let mut addresses: Vec<*mut c_void> =
            arguments.iter().map(|(address, _)| address.cast_mut()).collect();
        let (stream, addresses) = (Stream::COMPUTE.raw, addresses.as_mut_ptr());
        let Grid { blocks, threads, block_bytes } = grid;
        // SAFETY: the function belongs to the current device; each address points to as many bytes
        // as its parameter takes; the caller guarantees the kernel's memory accesses.
        let code = unsafe {
            sys::cuLaunchKernel(
                self.raw,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                block_bytes,
                stream,
                addresses,
                null_mut(),
            )
        };
        check("cuLaunchKernel", code)
    }

    fn allow_block_bytes(&self, bytes: u32) -> Outcome<()> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function's module is loaded on the current device.
        check("cuFuncSetAttribute", unsafe {
            sys::cuFuncSetAttribute(self.raw, attribute, bytes as c_int)
        })
    }
}

/// Returns the size of each parameter of a function, in bytes.
fn parameters(function: sys::CUfunction) -> Outcome<Vec<usize>> {
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function's module is loaded, and both results are written to live integers.
        match unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &mut offset, &mut size) } {
            // There is no parameter with this index.
            sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(sizes),
            code => check("cuFuncGetParamInfo", code)?,
        }
        sizes.push(size);
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once and unloaded once; the driver completes queued work first.
        let unload = || check("cuModuleUnload", unsafe { sys::cuModuleUnload(self.raw) });
        log_error(self.device.make_current().and_then(|()| unload()));
    }
}

pub(super) fn check(function: &str, code: sys::CUresult) -> Outcome<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut words) = (std::ptr::null(), std::ptr::null());
    // SAFETY: the results are written to live pointers; the driver sets them to null for an unknown
    // code.
    unsafe { (sys::cuGetErrorName(code, &mut name), sys::cuGetErrorString(code, &mut words)) };
    Err(format!("{function}: {} ({}, code {})", text(words), text(name), code as u32))
}

/// Logs an error that a destructor cannot return.
pub(super) fn log_error(outcome: Outcome<()>) {
    if let Err(what) = outcome {
        tracing::warn!("while releasing: {what}");
    }
}
