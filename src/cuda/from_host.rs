//! Copies from host memory to a GPU, in a stream beside the one in which libtorch computes.

use std::ffi::c_void;
use std::fmt;
use std::ptr::null_mut;
use std::rc::Rc;

use cudarc::driver::sys;
use tch::{Kind, Tensor};

use super::Outcome;
use super::driver::{self, Device, Event, Stream, check, log_error};

/// The stream of a GPU's copies.
pub struct FromHost {
    stream: Stream,
    device: Rc<Device>,
}

/// Memory of the host that is never moved or paged out, so that a GPU reads it by itself.
pub struct PinnedMemory {
    start: *mut c_void,
}

impl FromHost {
    /// Opens a stream of the GPU with this index.
    pub fn open(ordinal: usize) -> Outcome<Self> {
        driver::start()?;
        let device = Rc::new(Device::open(ordinal)?);
        Ok(FromHost { stream: Stream::new(&device)?, device })
    }

    /// Starts to copy a tensor's bytes, behind all work that libtorch has queued so far: until then
    /// `to` may be memory of an earlier tensor. Returns the event behind the copy.
    ///
    /// # Panics
    /// If the tensors are not contiguous, of one kind and one size (a bug in the caller).
    pub fn start(&self, from: &Tensor, to: &Tensor) -> Outcome<Event> {
        assert!(from.is_contiguous() && to.is_contiguous());
        assert_eq!((from.size(), from.kind()), (to.size(), to.kind()));
        self.device.make_current()?;
        self.stream.wait(&Stream::COMPUTE.record()?)?;
        let bytes = from.numel() * from.kind().elt_size_in_bytes();
        let (from, to) = (from.data_ptr(), to.data_ptr() as sys::CUdeviceptr);
        // SAFETY: both tensors have so many bytes. The caller keeps `to` until the compute stream
        // waits for the event, and `from` as it is until the event is complete.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from, bytes, self.stream.raw())
        })?;
        self.stream.record()
    }

    /// Makes the compute stream wait for a copy.
    pub fn finish(copied: &Event) -> Outcome<()> {
        Stream::COMPUTE.wait(copied)
    }
}

impl PinnedMemory {
    /// Returns memory of so many bytes that the GPU with this index reads, and zeros in it as a
    /// tensor of a kind, which must not outlive the memory.
    pub fn zeros(ordinal: usize, length: i64, kind: Kind) -> Outcome<(Self, Tensor)> {
        driver::start()?;
        let _current = Device::open(ordinal)?;
        let bytes = length as usize * kind.elt_size_in_bytes();
        let mut start = null_mut();
        // SAFETY: a device is current, and the result is written to a live pointer.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut start, bytes.max(1), 0) })?;
        let memory = PinnedMemory { start };
        // SAFETY: the memory has the tensor's bytes, and the caller lets the tensor go first.
        let mut tensor = unsafe {
            Tensor::from_blob(start.cast_const().cast(), &[length], &[1], kind, tch::Device::Cpu)
        };
        let _ = tensor.zero_();
        Ok((memory, tensor))
    }
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedMemory")
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated once and freed once, and the tensor over it is gone.
        log_error(check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(self.start) }));
    }
}
