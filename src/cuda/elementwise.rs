//! A kernel that makes one pass over the elements of several tensors.

use tch::{Device, Kind, Tensor};

use super::Outcome;
use super::driver::Grid;
use super::program::{Argument, Program, THREADS, Text};

/// Elements that a thread processes at a time, where tensors start at a multiple of 16 bytes.
const ELEMENTS_EACH: u32 = 4;

/// The source of a kernel: `extern "C" __global__ void name(tensors…, long long length,
/// arguments…)`. It must loop over the grid (a thread's next element is one grid further on) and
/// access only elements 0 to `length` − 1 of each tensor.
pub struct Source {
    pub text: Text,
    pub name: &'static str,
    /// Kinds of the tensors, in the order of the parameters.
    pub kinds: &'static [Kind],
}

/// A kernel that is ready to run on one device.
pub struct Elementwise {
    program: Program,
    source: &'static Source,
}

impl Elementwise {
    /// Compiles a kernel for `device` and loads it there.
    ///
    /// # Errors
    /// As [`Program::load`].
    pub fn build(source: &'static Source, device: Device) -> Outcome<Self> {
        let compile = |architecture: &str| source.text.compile(architecture);
        Ok(Elementwise { program: Program::load(device, compile)?, source })
    }

    /// Runs the kernel over the first `length` elements of each tensor, in order with libtorch's
    /// work on the compute stream. A missing tensor becomes a null pointer.
    ///
    /// # Errors
    /// As [`Program::launch`].
    ///
    /// # Panics
    /// As [`Program::launch`]; if a tensor is of another kind, or shorter than `length` (a bug in
    /// the caller).
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
        let blocks = (length as u64).div_ceil(u64::from(THREADS * ELEMENTS_EACH));
        let grid = Grid { blocks: self.program.blocks(blocks), threads: THREADS, block_bytes: 0 };
        let length = [length];
        let tensors =
            tensors.iter().map(|tensor| tensor.map_or(Argument::Missing, Argument::Tensor));
        let all: Vec<Argument<'_>> =
            tensors.chain([Argument::Integers(&length)]).chain(arguments.iter().copied()).collect();
        self.program.launch(self.source.name, grid, &all)
    }

    fn check(&self, tensor: &Tensor, kind: Kind, length: i64) {
        assert_eq!(tensor.kind(), kind, "kind of a tensor of {}", self.source.name);
        assert!(
            (0..=tensor.numel() as i64).contains(&length),
            "{length} elements of {}",
            tensor.numel()
        );
    }
}
