//! Kernels of our own: one pass over the elements of several tensors.

use std::ffi::{CString, c_void};
use std::ptr::null_mut;

use tch::{Device, Kind, Tensor};

use super::driver::{self, Function};
use super::{Outcome, nvrtc};

/// Threads of a block: a multiple of what any GPU runs in step, and few enough for any number of
/// registers a thread.
const THREADS: u32 = 256;
/// Blocks that a processor holds at once, at 2048 threads. More would only wait; threads go round
/// instead.
const BLOCKS_EACH: u32 = 8;
/// Elements that a thread takes at a time, where tensors begin at a multiple of 16 bytes.
const ELEMENTS_EACH: u32 = 4;

/// A kernel's text: `extern "C" __global__ void name(tensors…, long long length, arguments…)`. It
/// goes round (a thread's next element lies a grid further on) and touches elements 0 to `length` −
/// 1 of each tensor and no other memory: who writes it answers for that, as for the text of an
/// `unsafe` block.
pub struct Source {
    /// What the compiler's messages call it.
    pub file: &'static str,
    pub text: &'static str,
    pub name: &'static str,
    /// Kinds of the tensors, in the parameters' order.
    pub kinds: &'static [Kind],
}

/// What a kernel takes by value besides its tensors: a number, or an array or struct of them.
pub enum Argument<'a> {
    /// `long long`.
    Integers(&'a [i64]),
    /// `float`.
    Numbers(&'a [f32]),
}

/// A kernel that is ready to run on one device.
pub struct Elementwise {
    function: Function,
    source: &'static Source,
    device: Device,
    most_blocks: u32,
}

impl Argument<'_> {
    fn place(&self) -> (*const c_void, usize) {
        match self {
            Argument::Integers(integers) => (integers.as_ptr().cast(), size_of_val(*integers)),
            Argument::Numbers(numbers) => (numbers.as_ptr().cast(), size_of_val(*numbers)),
        }
    }
}

impl Elementwise {
    /// Compiles a kernel for `device` and loads it there. `Device::Cpu` in place of a GPU is for a
    /// stand-in of the driver that works on the host's memory.
    ///
    /// # Errors
    /// What NVRTC or the driver refuses, or that it is not there.
    pub fn build(source: &'static Source, device: Device) -> Outcome<Self> {
        driver::start()?;
        let gpu =
            driver::Device::open(if let Device::Cuda(ordinal) = device { ordinal } else { 0 })?;
        let code = nvrtc::compile(source.file, source.text, &gpu.architecture()?)?;
        let most_blocks = BLOCKS_EACH * gpu.num_processors()?;
        let name = CString::new(source.name).expect("names have no zeros");
        Ok(Elementwise {
            function: Function::load(&code, &name, gpu)?,
            source,
            device,
            most_blocks,
        })
    }

    /// Runs the kernel over the first `length` elements of each tensor, behind all that libtorch
    /// has queued and before all that it queues from here on. A missing tensor is a null pointer.
    ///
    /// # Errors
    /// What the driver refuses, also for what was queued earlier.
    ///
    /// # Panics
    /// If a tensor is not contiguous, of another kind or elsewhere, or shorter than `length`, or if
    /// the arguments are not as long as the kernel's parameters (a bug in the caller).
    pub fn run(
        &self,
        length: i64,
        tensors: &[Option<&Tensor>],
        arguments: &[Argument<'_>],
    ) -> Outcome<()> {
        assert_eq!(tensors.len(), self.source.kinds.len(), "tensors of {}", self.source.name);
        tensors.iter().zip(self.source.kinds).for_each(|(tensor, kind)| {
            tensor.iter().for_each(|tensor| self.check(tensor, *kind, length))
        });
        if length == 0 {
            return Ok(());
        }
        let starts: Vec<*mut c_void> =
            tensors.iter().map(|tensor| tensor.map_or(null_mut(), Tensor::data_ptr)).collect();
        let starts = starts.iter().map(|start| ((&raw const *start).cast(), size_of_val(start)));
        let count = [length];
        let arguments = [Argument::Integers(&count).place()]
            .into_iter()
            .chain(arguments.iter().map(Argument::place));
        let places: Vec<_> = starts.chain(arguments).collect();
        let blocks = (length as u64)
            .div_ceil(u64::from(THREADS * ELEMENTS_EACH))
            .min(u64::from(self.most_blocks)) as u32;
        // SAFETY: the kernel keeps to the first `length` elements of its tensors, which each of
        // them has; libtorch gives their memory out again behind the compute stream only.
        unsafe { self.function.launch(blocks, THREADS, &places) }
    }

    fn check(&self, tensor: &Tensor, kind: Kind, length: i64) {
        let found = (tensor.kind(), tensor.device(), tensor.is_contiguous());
        assert_eq!(
            found,
            (kind, self.device, true),
            "kind, device and contiguity of a tensor of {}",
            self.source.name
        );
        assert!(
            (0..=tensor.numel() as i64).contains(&length),
            "{length} elements of {}",
            tensor.numel()
        );
    }
}
