//! The CUDA driver, as far as collectives need it: one device, streams and events. No call in here blocks.
//!
//! cudarc's own safe layer synchronizes in places and owns what libtorch owns already, so only its raw layer is used. A
//! refusal comes back in words; the caller knows which operation it spoils.

use std::ffi::{CStr, c_char, c_int};
use std::ptr::null_mut;
use std::rc::Rc;
use std::result::Result as StdResult;
use std::time::Duration;

use cudarc::driver::sys;

/// What a library function gave, or its name and why it refused.
pub(super) type Outcome<T> = StdResult<T, String>;

/// What the wheel of libtorch 2.13 is built with: 1000 times the major version.
const NEEDED_VERSION: c_int = 13_000;

/// A GPU and its primary context, which libtorch uses too.
pub(super) struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
}

/// Checks that a driver is installed and new enough, starts it, and counts the GPUs that it shows to this process.
pub(super) fn start() -> Outcome<usize> {
    // SAFETY: only opens libraries; a driver's initializers ask nothing of the process.
    if !unsafe { sys::is_culib_present() } {
        return Err("no CUDA driver is installed here: found neither libcuda.so nor libcuda.so.1".into());
    }
    // SAFETY: the flags must be zero.
    check("cuInit", unsafe { sys::cuInit(0) })?;
    let mut version = 0;
    // SAFETY: the result has a place.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < NEEDED_VERSION {
        let words = |version: c_int| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(format!("the NVIDIA driver speaks CUDA {}, {} is needed: update it", words(version), words(NEEDED_VERSION)));
    }
    let mut count = 0;
    // SAFETY: the result has a place.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// A name that no other GPU has.
pub(super) fn uuid(ordinal: usize) -> Outcome<String> {
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
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, handle) })?;
        let device = Device { handle, context };
        device.make_current()?;
        Ok(device)
    }

    /// What follows on this thread means this device. libtorch's choice is the same context, unless a caller changed it.
    pub fn make_current(&self) -> Outcome<()> {
        // SAFETY: the context is retained.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// What the vendor calls it.
    pub fn name(&self) -> Outcome<String> {
        let mut name: [c_char; 100] = [0; 100];
        // SAFETY: the driver writes a text with its final zero into the length that it is told.
        check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, self.handle) })?;
        // SAFETY: as above; `name` outlives the borrow.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once, released once; streams and events of this device hold it until they are gone.
        note(check("cuDevicePrimaryCtxRelease", unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) }));
    }
}

/// A queue of a device's work.
pub(super) struct Stream {
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
            // SAFETY: created here and destroyed once; the driver frees it when what is queued is done.
            note(check("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(self.raw) }));
        }
    }
}

/// A mark in a stream, with the time at which the device came by.
pub(super) struct Event {
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
        check("cuEventElapsedTime", unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.raw, self.raw) })?;
        // The device's clock is said to be good to half a microsecond: two marks that close may come out negative.
        Ok(Duration::try_from_secs_f64(f64::from(milliseconds) / 1e3).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created here and destroyed once; the driver keeps what waits for it until the device has come by.
        note(check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.raw) }));
    }
}

fn check(function: &str, code: sys::CUresult) -> Outcome<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut words) = (std::ptr::null(), std::ptr::null());
    // SAFETY: the results have a place; the driver leaves null there for a code that it does not know.
    unsafe { (sys::cuGetErrorName(code, &mut name), sys::cuGetErrorString(code, &mut words)) };
    Err(format!("{function}: {} ({}, code {})", text(words), text(name), code as u32))
}

/// A text that a library keeps for the life of the process.
pub(super) fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return "no text".into();
    }
    // SAFETY: the libraries end these texts with a zero.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().into()
}

/// For what a destructor cannot return.
fn note(outcome: Outcome<()>) {
    if let Err(what) = outcome {
        tracing::warn!("while giving back: {what}");
    }
}
