//! Own kernels that make one pass over the elements of several tensors.

use std::ffi::{CString, c_void};
use std::ptr::null_mut;

use tch::{Device, Kind, Tensor};

use super::driver::{self, Function};
use super::{Outcome, nvrtc};

/// Threads of a block: a multiple of any GPU's warp size, and few enough for any number of
/// registers per thread.
const THREADS: u32 = 256;
/// Blocks that a multiprocessor holds at once, with 2048 threads. More blocks would only wait; a
/// kernel loops over the grid instead.
const BLOCKS_EACH: u32 = 8;
/// Elements that a thread processes at a time, where tensors start at a multiple of 16 bytes.
const ELEMENTS_EACH: u32 = 4;

/// The source of a kernel: `extern "C" __global__ void name(tensors…, long long length,
/// arguments…)`. It must loop over the grid (a thread's next element is one grid further on) and
/// access only elements 0 to `length` − 1 of each tensor. The author is responsible for that, as
/// for the code of an `unsafe` block.
pub struct Source {
    /// Name of the source in the compiler's messages.
    pub file: &'static str,
    pub text: &'static str,
    pub name: &'static str,
    /// Kinds of the tensors, in the order of the parameters.
    pub kinds: &'static [Kind],
}

/// A parameter that a kernel takes by value besides its tensors: a number, or an array or struct of
/// numbers.
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
    fn address_and_size(&self) -> (*const c_void, usize) {
        match self {
            Argument::Integers(integers) => (integers.as_ptr().cast(), size_of_val(*integers)),
            Argument::Numbers(numbers) => (numbers.as_ptr().cast(), size_of_val(*numbers)),
        }
    }
}

impl Elementwise {
    /// Compiles a kernel for `device` and loads it there. Pass `Device::Cpu` instead of a GPU to
    /// run with the tests' double of the driver, which works in host memory.
    ///
    /// # Errors
    /// An error of NVRTC or the driver, or a message that one of them is not installed.
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

    /// Runs the kernel over the first `length` elements of each tensor, in order with libtorch's
    /// work on the compute stream. A missing tensor becomes a null pointer.
    ///
    /// # Errors
    /// An error of the driver, possibly of work that was queued earlier.
    ///
    /// # Panics
    /// If a tensor is not contiguous, is of another kind or on another device, or is shorter than
    /// `length`, or if the arguments' sizes are not those of the kernel's parameters (a bug in the
    /// caller).
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
        let arguments = [Argument::Integers(&count).address_and_size()]
            .into_iter()
            .chain(arguments.iter().map(Argument::address_and_size));
        let parameters: Vec<_> = starts.chain(arguments).collect();
        let blocks = (length as u64)
            .div_ceil(u64::from(THREADS * ELEMENTS_EACH))
            .min(u64::from(self.most_blocks)) as u32;
        // SAFETY: the kernel accesses only the first `length` elements of its tensors, which each
        // of them has; libtorch reuses their memory only for later work of the compute stream.
        unsafe { self.function.launch(blocks, THREADS, &parameters) }
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
