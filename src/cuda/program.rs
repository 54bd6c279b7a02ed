//! Own kernels: a text that is compiled for one device and loaded there, and launches of its
//! functions.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use tch::{Device, Tensor};

use super::driver::{self, Function, Grid, Module};
use super::{Outcome, nvrtc};

/// Threads of a block: a multiple of any GPU's warp size, and few enough for any number of
/// registers per thread.
pub const THREADS: u32 = 256;
/// Blocks that a multiprocessor holds at once, with 2048 threads. More blocks would only wait; a
/// kernel that loops over the grid needs no more.
const BLOCKS_EACH: u32 = 8;

/// The text of kernels that are compiled together. They are `extern "C" __global__` functions,
/// whose author is responsible for what memory they access, as for the code of an `unsafe` block.
#[derive(Clone, Copy, Debug)]
pub struct Text {
    /// Name of the text in the compiler's messages.
    pub file: &'static str,
    /// Pieces that are compiled one after the other.
    pub pieces: &'static [&'static str],
}

/// A parameter of a kernel.
#[derive(Clone, Copy)]
pub enum Argument<'a> {
    /// A pointer to a contiguous tensor's numbers.
    Tensor(&'a Tensor),
    /// A pointer to the first number of a tensor whose rows lie apart.
    Rows(&'a Tensor),
    /// A null pointer.
    Missing,
    /// `long long`, or an array or struct of them.
    Integers(&'a [i64]),
    /// `float`, or an array or struct of them.
    Numbers(&'a [f32]),
}

/// A text that is loaded on one device.
pub struct Program {
    module: Arc<Module>,
    functions: Mutex<BTreeMap<String, Arc<Function>>>,
    device: Device,
    most_blocks: u32,
}

impl Text {
    /// Compiles the text for an architecture like `sm_90`.
    ///
    /// # Errors
    /// The compiler's messages.
    pub fn compile(&self, architecture: &str) -> Outcome<Vec<u8>> {
        nvrtc::compile(self.file, &self.pieces.concat(), architecture)
    }
}

impl Program {
    /// Loads on `device` the machine code that `compile` makes for its architecture. Pass
    /// `Device::Cpu` instead of a GPU to run with the tests' double of the driver, which works in
    /// host memory.
    ///
    /// # Errors
    /// An error of NVRTC or the driver, or a message that one of them is not installed.
    pub fn load(device: Device, compile: impl FnOnce(&str) -> Outcome<Vec<u8>>) -> Outcome<Self> {
        driver::start()?;
        let gpu =
            driver::Device::open(if let Device::Cuda(ordinal) = device { ordinal } else { 0 })?;
        let code = compile(&gpu.architecture()?)?;
        let most_blocks = BLOCKS_EACH * gpu.num_processors()?;
        let module = Module::load(&code, gpu)?;
        Ok(Program { module, functions: Mutex::default(), device, most_blocks })
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the blocks of a kernel that loops over the grid and would have enough with `blocks`.
    pub fn blocks(&self, blocks: u64) -> u32 {
        blocks.min(u64::from(self.most_blocks)) as u32
    }

    /// Launches a kernel in order with libtorch's work on the compute stream.
    ///
    /// # Errors
    /// An error of the driver, possibly of work that was queued earlier.
    ///
    /// # Panics
    /// If a tensor is on another device, or not contiguous where it must be, or if the arguments'
    /// sizes are not those of the kernel's parameters (a bug in the caller).
    pub fn launch(&self, name: &str, grid: Grid, arguments: &[Argument<'_>]) -> Outcome<()> {
        let function = self.function(name)?;
        let pointers: Vec<*mut c_void> =
            arguments.iter().map(|argument| self.pointer(name, argument)).collect();
        let parameter = |(argument, pointer): (&Argument<'_>, &*mut c_void)| match argument {
            Argument::Tensor(_) | Argument::Rows(_) | Argument::Missing => {
                ((&raw const *pointer).cast(), size_of_val(pointer))
            }
            Argument::Integers(integers) => (integers.as_ptr().cast(), size_of_val(*integers)),
            Argument::Numbers(numbers) => (numbers.as_ptr().cast(), size_of_val(*numbers)),
        };
        let parameters: Vec<(*const c_void, usize)> =
            arguments.iter().zip(&pointers).map(parameter).collect();
        // SAFETY: the kernel's author answers for its accesses to the tensors; libtorch reuses
        // their memory only for later work of the compute stream.
        unsafe { function.launch(grid, &parameters) }
    }

    /// The start of a tensor; null for what is none.
    fn pointer(&self, name: &str, argument: &Argument<'_>) -> *mut c_void {
        let (tensor, fits) = match argument {
            Argument::Tensor(tensor) => (tensor, tensor.is_contiguous()),
            Argument::Rows(tensor) => (tensor, true),
            _ => return std::ptr::null_mut(),
        };
        let found = (tensor.device(), fits);
        assert_eq!(found, (self.device, true), "device and contiguity of a tensor of {name}");
        tensor.data_ptr()
    }

    fn function(&self, name: &str) -> Outcome<Arc<Function>> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        let function = Arc::new(self.module.function(name)?);
        functions.insert(name.into(), function.clone());
        Ok(function)
    }
}
