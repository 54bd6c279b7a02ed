//! The CUDA driver, as far as it is needed: a device, streams and events, modules and their
//! functions. No call in here blocks.
//!
//! cudarc's own safe layer synchronizes in places and owns what libtorch owns already, so only its
//! raw layer is used.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::rc::Rc;
use std::time::Duration;

use cudarc::driver::sys;

use super::{Outcome, text};

/// What the wheel of libtorch 2.13 is built with: 1000 times the major version.
const NEEDED_VERSION: c_int = 13_000;

/// A GPU and its primary context, which libtorch uses too.
pub struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
}

/// Checks that a driver is installed and new enough, starts it, and counts the GPUs that it shows
/// to this process.
pub fn start() -> Outcome<usize> {
    // SAFETY: only opens libraries; a driver's initializers ask nothing of the process.
    if !unsafe { sys::is_culib_present() } {
        return Err(
            "no CUDA driver is installed here: found neither libcuda.so nor libcuda.so.1".into()
        );
    }
    // SAFETY: the flags must be zero.
    check("cuInit", unsafe { sys::cuInit(0) })?;
    let mut version = 0;
    // SAFETY: the result has a place.
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
    // SAFETY: the result has a place.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// A name that no other GPU has.
pub fn uuid(ordinal: usize) -> Outcome<String> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the driver gave the handle, and the result has a place.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, handle(ordinal)?) })?;
    Ok(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
}

fn handle(ordinal: usize) -> Outcome<sys::CUdevice> {
    let mut handle = 0;
    // SAFETY: the driver runs, and the result has a place.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut handle, ordinal as c_int) })?;
    Ok(handle)
}

impl Device {
    /// The GPU of this number, current on this thread from here on.
    pub fn open(ordinal: usize) -> Outcome<Self> {
        let handle = handle(ordinal)?;
        let mut context = null_mut();
        // SAFETY: the driver gave the handle, and the result has a place.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, handle)
        })?;
        let device = Device { handle, context };
        device.make_current()?;
        Ok(device)
    }

    /// What follows on this thread means this device. libtorch's choice is the same context, unless
    /// a caller changed it.
    pub fn make_current(&self) -> Outcome<()> {
        // SAFETY: the context is retained.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// What the vendor calls it.
    pub fn name(&self) -> Outcome<String> {
        let mut name: [c_char; 100] = [0; 100];
        // SAFETY: the driver writes a text with its final zero into the length that it is told.
        check("cuDeviceGetName", unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, self.handle)
        })?;
        // SAFETY: as above; `name` outlives the borrow.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// What machine code for it is called, like `sm_90`.
    pub fn architecture(&self) -> Outcome<String> {
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok(format!("sm_{}{}", self.attribute(MAJOR)?, self.attribute(MINOR)?))
    }

    /// How many of its processors run blocks of threads at once.
    pub fn num_processors(&self) -> Outcome<u32> {
        let count =
            self.attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        u32::try_from(count).map_err(|_| format!("the driver counts {count} processors"))
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Outcome<c_int> {
        let mut value = 0;
        // SAFETY: the driver gave the handle, and the result has a place.
        check("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&mut value, attribute, self.handle)
        })?;
        Ok(value)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once, released once; streams and events of this device hold it until
        // they are gone.
        note(check("cuDevicePrimaryCtxRelease", unsafe {
            sys::cuDevicePrimaryCtxRelease_v2(self.handle)
        }));
    }
}

/// A queue of a device's work.
pub struct Stream {
    raw: sys::CUstream,
    device: Option<Rc<Device>>,
}

impl Stream {
    /// Where libtorch computes: the legacy default stream of the current device.
    pub const COMPUTE: Stream = Stream { raw: null_mut(), device: None };

    /// A queue beside the compute stream, ordered with it by events only.
    pub fn beside(device: &Rc<Device>) -> Outcome<Self> {
        let mut raw = null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the device is current, and the result has a place.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Stream { raw, device: Some(device.clone()) })
    }

    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// What is queued from here on begins after what `event` marks.
    pub fn wait(&self, event: &Event) -> Outcome<()> {
        // SAFETY: both handles are of the current device and not destroyed.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) })
    }

    /// A mark behind all that is queued so far.
    pub fn mark(&self) -> Outcome<Event> {
        let event = Event::new()?;
        // SAFETY: both handles are of the current device and not destroyed.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.raw, self.raw) })?;
        Ok(event)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.is_some() {
            // SAFETY: created here and destroyed once; the driver frees it when what is queued is
            // done.
            note(check("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(self.raw) }));
        }
    }
}

/// A mark in a stream, with the time at which the device came by.
pub struct Event {
    raw: sys::CUevent,
}

impl Event {
    fn new() -> Outcome<Self> {
        let mut raw = null_mut();
        let flags = sys::CUevent_flags_enum::CU_EVENT_DEFAULT as u32;
        // SAFETY: the device is current, and the result has a place.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, flags) })?;
        Ok(Event { raw })
    }

    /// Whether the device has come by.
    pub fn is_past(&self) -> Outcome<bool> {
        // SAFETY: the event exists.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuEventQuery", code).map(|()| true),
        }
    }

    /// What passed between two marks that the device has passed.
    pub fn elapsed_since(&self, earlier: &Event) -> Outcome<Duration> {
        let mut milliseconds = 0.0;
        // SAFETY: both events exist, and the result has a place.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.raw, self.raw)
        })?;
        // The device's clock is said to be good to half a microsecond: two marks that close may
        // come out negative.
        Ok(Duration::try_from_secs_f64(f64::from(milliseconds) / 1e3).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created here and destroyed once; the driver keeps what waits for it until the
        // device has come by.
        note(check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.raw) }));
    }
}

/// A kernel that was loaded for a device.
pub struct Function {
    raw: sys::CUfunction,
    /// Bytes of each parameter, as its code expects them.
    parameters: Vec<usize>,
    module: Module,
}

/// Machine code in a device's memory.
struct Module {
    raw: sys::CUmodule,
    device: Device,
}

impl Function {
    /// The function of this name in an image for `device`.
    pub fn load(image: &[u8], name: &CStr, device: Device) -> Outcome<Self> {
        let mut raw = null_mut();
        // SAFETY: the device is current, the image says its own length, the driver copies it, and
        // the result has a place.
        check("cuModuleLoadData", unsafe {
            sys::cuModuleLoadData(&mut raw, image.as_ptr().cast())
        })?;
        let module = Module { raw, device };
        let mut raw = null_mut();
        // SAFETY: the module is loaded, the name ends with a zero, and the result has a place.
        check("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&mut raw, module.raw, name.as_ptr())
        })?;
        Ok(Function { raw, parameters: parameters(raw)?, module })
    }

    pub fn device(&self) -> &Device {
        &self.module.device
    }

    /// Queues the function behind all that libtorch has queued, with the address of each argument.
    /// They are copied at once.
    ///
    /// # Panics
    /// If the arguments' sizes are not those of the parameters (a bug in the caller).
    ///
    /// # Safety
    /// The function must keep to memory that stays its own until the stream has come by.
    pub unsafe fn launch(
        &self,
        blocks: u32,
        threads: u32,
        arguments: &[(*const c_void, usize)],
    ) -> Outcome<()> {
        let sizes: Vec<usize> = arguments.iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, self.parameters, "bytes of the arguments and of the kernel's parameters");
        self.device().make_current()?;
        let mut addresses: Vec<*mut c_void> =
            arguments.iter().map(|(address, _)| address.cast_mut()).collect();
        let (stream, addresses) = (Stream::COMPUTE.raw, addresses.as_mut_ptr());
        // SAFETY: the function is of the current device; each address holds as many bytes as its
        // parameter takes, for the driver to read; the caller answers for what the function does.
        let code = unsafe {
            sys::cuLaunchKernel(
                self.raw,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                stream,
                addresses,
                null_mut(),
            )
        };
        check("cuLaunchKernel", code)
    }
}

/// Bytes of each parameter of a function.
fn parameters(function: sys::CUfunction) -> Outcome<Vec<usize>> {
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function's module is loaded, and both results have a place.
        match unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &mut offset, &mut size) } {
            // There is no parameter of this number.
            sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(sizes),
            code => check("cuFuncGetParamInfo", code)?,
        }
        sizes.push(size);
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once and unloaded once; the driver lets what is queued finish first.
        let unload = || check("cuModuleUnload", unsafe { sys::cuModuleUnload(self.raw) });
        note(self.device.make_current().and_then(|()| unload()));
    }
}

fn check(function: &str, code: sys::CUresult) -> Outcome<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut words) = (std::ptr::null(), std::ptr::null());
    // SAFETY: the results have a place; the driver leaves null there for a code that it does not
    // know.
    unsafe { (sys::cuGetErrorName(code, &mut name), sys::cuGetErrorString(code, &mut words)) };
    Err(format!("{function}: {} ({}, code {})", text(words), text(name), code as u32))
}

/// For what a destructor cannot return.
fn note(outcome: Outcome<()>) {
    if let Err(what) = outcome {
        tracing::warn!("while giving back: {what}");
    }
}
