//! Launches of own kernels, which the passes of operations on a GPU are made of.
//!
//! The kernels of an operation are one text, `kernel.cu` in its folder, behind `prelude.cu`. It is
//! compiled when the process first needs it on a GPU; the machine code is kept in the user's cache
//! folder, so that a second start compiles nothing.

use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::{Misfit, Pass};
use crate::cuda::{Argument, Grid, Outcome, Program, THREADS, Text, nvrtc};
use crate::files::cache::Cache;
use crate::files::sha256::hex;
use crate::folders;

/// Threads of a warp.
pub const WARP: u64 = 32;
/// Floats at the start of a block's memory, for a sum of each warp.
const SUMS: u64 = 32;
/// Most bytes of a block's memory on every GPU since sm_80.
const MOST_BLOCK_BYTES: u64 = 99 << 10;
/// Numbers of a row up to which a warp computes it, not a block.
const WIDTH_OF_A_WARP: i64 = 512;
/// Most numbers of a tensor: kernels count vectors, rows and columns in 32 bits.
const MOST_NUMBERS: usize = 1 << 31;
/// Columns that a block adds up in [`column_sums`].
const COLUMNS: i64 = 8;

/// The pieces of a text of kernels: the prelude, and the file beside the one that calls, whose own
/// lines the compiler counts.
macro_rules! kernel_text {
    ($file:literal) => {
        &[$crate::ops::launch::PRELUDE, "#line 1\n", include_str!($file)]
    };
}
pub(super) use kernel_text;

pub const PRELUDE: &str = include_str!("prelude.cu");

pub static COLUMN_SUMS: KernelFile =
    KernelFile::new("launch/column_sums.cu", kernel_text!("column_sums.cu"));

/// The kernels of an operation, compiled and loaded once for each device.
pub struct KernelFile {
    text: Text,
    loaded: Mutex<Vec<Arc<Program>>>,
}

impl KernelFile {
    /// The text of a `kernel.cu`: its name in messages, and itself.
    pub const fn new(file: &'static str, pieces: &'static [&'static str]) -> Self {
        KernelFile { text: Text { file, pieces }, loaded: Mutex::new(Vec::new()) }
    }

    pub fn text(&self) -> Text {
        self.text
    }

    /// Compiles the kernels for `device`, or finds them compiled, and loads them there.
    ///
    /// # Errors
    /// Words of the compiler or of the driver.
    pub fn on(&self, device: Device) -> Outcome<Arc<Program>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = loaded.iter().find(|program| program.device() == device) {
            return Ok(program.clone());
        }
        let program = Arc::new(Program::load(device, |architecture| self.code(architecture))?);
        loaded.push(program.clone());
        Ok(program)
    }

    /// Launches a kernel behind all that libtorch has queued.
    ///
    /// # Panics
    /// If the compiler or the driver refuses, as libtorch's own operators do: mostly for something
    /// that was queued earlier.
    pub fn launch(&self, device: Device, name: &str, extent: Extent, arguments: &[Argument<'_>]) {
        let launch = || {
            let program = self.on(device)?;
            let Extent { blocks, threads, block_bytes, loops } = extent;
            let blocks = if loops { program.blocks(blocks) } else { blocks as u32 };
            program.launch(name, Grid { blocks, threads, block_bytes }, arguments)
        };
        launch().unwrap_or_else(|what| panic!("the kernel {name}: {what}"));
    }

    /// Machine code from the cache, or from the compiler.
    fn code(&self, architecture: &str) -> Outcome<Vec<u8>> {
        let Some(cache) = folders::cache() else { return self.text.compile(architecture) };
        let cache = Cache::new(&cache.join("fm-dist"), "kernels");
        let mut hash = Sha256::new();
        self.text.pieces.iter().for_each(|piece| hash.update(piece));
        let (version, options) = (nvrtc::version()?, nvrtc::OPTIONS);
        let key = format!("NVRTC {version} {options:?} {architecture} {}", hex(hash));
        if let Some(code) = cache.read(&key) {
            return Ok(code);
        }
        let code = self.text.compile(architecture)?;
        if let Err(why) = cache.write(&key, &code) {
            tracing::debug!("{} will be compiled anew at the next start: {why}", self.text.file);
        }
        Ok(code)
    }
}

/// The threads of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    blocks: u64,
    threads: u32,
    block_bytes: u32,
    /// True if the kernel goes on with fewer blocks, over the grid.
    loops: bool,
}

impl Extent {
    /// A thread for each of `count` things; no more than the GPU holds at once.
    pub fn threads(count: u64) -> Self {
        let blocks = count.div_ceil(THREADS.into());
        Extent { blocks, threads: THREADS, block_bytes: 0, loops: true }
    }

    /// This many blocks.
    pub fn blocks(blocks: i64, threads: u32) -> Self {
        Extent { blocks: blocks as u64, threads, block_bytes: 0, loops: false }
    }
}

/// Threads that compute a row together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Team {
    size: u64,
}

impl Team {
    /// The team of rows of `width` numbers, which it reads in vectors of `numbers`: a block for a
    /// wide row, and no more threads than it has vectors for a narrow one.
    pub fn of_row(width: i64, numbers: i64) -> Self {
        let vectors = (width / numbers) as u64;
        let is_wide = width > WIDTH_OF_A_WARP;
        Team { size: if is_wide { THREADS.into() } else { vectors.next_power_of_two().min(WARP) } }
    }

    /// The kernel's argument.
    pub fn size(self) -> i64 {
        self.size as i64
    }

    /// Teams of a block.
    fn teams(self) -> u64 {
        u64::from(THREADS) / self.size
    }

    /// A team for each of `rows`; no more than the GPU holds at once.
    pub fn each(self, rows: i64) -> Extent {
        let blocks = (rows as u64).div_ceil(self.teams());
        Extent { blocks, threads: THREADS, block_bytes: (SUMS * 4) as u32, loops: true }
    }

    /// Rows that a block takes if it sums columns over them: few enough that all of a GPU works.
    pub fn block_rows(self) -> i64 {
        16 * self.teams() as i64
    }

    /// Blocks of [`block_rows`](Self::block_rows), each team of which sums `columns`.
    pub fn summing(self, blocks: i64, columns: i64) -> Extent {
        Extent {
            blocks: blocks as u64,
            threads: THREADS,
            block_bytes: self.block_bytes(columns) as u32,
            loops: false,
        }
    }

    fn block_bytes(self, columns: i64) -> u64 {
        4 * (SUMS + self.teams() * columns as u64)
    }

    /// Checks that a block has room to sum the columns of rows of `width` numbers, each of them
    /// `times` times.
    ///
    /// # Errors
    /// [`Misfit::Shape`].
    pub fn has_room(width: i64, times: i64) -> Result<(), Misfit> {
        let has_room = |numbers| {
            let team = Team::of_row(width, numbers);
            team.block_bytes(times * width) <= MOST_BLOCK_BYTES
        };
        if [1, 4, 8].into_iter().all(has_room) { Ok(()) } else { Err(Misfit::Shape) }
    }
}

/// Checks that kernels can count the numbers of a tensor.
///
/// # Errors
/// [`Misfit::Shape`].
pub fn is_counted(tensor: &Tensor) -> Result<(), Misfit> {
    if tensor.numel() < MOST_NUMBERS { Ok(()) } else { Err(Misfit::Shape) }
}

/// The name of a kind in a kernel's name.
pub fn word(tensor: &Tensor) -> &'static str {
    if tensor.kind() == Kind::BFloat16 { "bfloat16" } else { "float" }
}

/// Numbers of the first tensor that a kernel reads at a time: 16 bytes of them if all tensors begin
/// at a multiple of 16 bytes, and so do what it reads `steps` numbers apart; else `least`.
pub fn vector(steps: &[i64], tensors: &[&Tensor], least: i64) -> i64 {
    let numbers = 16 / tensors[0].kind().elt_size_in_bytes() as i64;
    let is_aligned = |tensor: &&Tensor| (tensor.data_ptr() as usize).is_multiple_of(16);
    let fits = steps.iter().all(|step| step % numbers == 0) && tensors.iter().all(is_aligned);
    if fits { numbers } else { least }
}

/// Returns `x` as kernels read it that take the last `axes` axes as a row, wherever rows begin as
/// long as they lie equally far apart; on a CPU, without gaps.
pub fn in_rows(pass: Pass, axes: usize, x: Tensor) -> Tensor {
    if pass == Pass::Cuda && pitch_of(&x, axes).is_some() { x } else { x.contiguous() }
}

/// A tensor of the shape and kind of `x`, whose rows lie behind each other.
pub fn without_gaps(x: &Tensor) -> Tensor {
    Tensor::empty(x.size(), (x.kind(), x.device()))
}

/// Numbers from the beginning of a row of [`in_rows`] to that of the next one.
pub fn pitch(x: &Tensor, axes: usize) -> i64 {
    pitch_of(x, axes).expect("rows that lie equally far apart")
}

fn pitch_of(x: &Tensor, axes: usize) -> Option<i64> {
    let (sizes, strides) = (x.size(), x.stride());
    let axis = |number: usize| (sizes[number], strides[number]);
    let last = sizes.len() - axes;
    let row = dense(1, (last..sizes.len()).map(axis))?;
    // Axes of one element may have any stride.
    let outer = (0..last).map(axis).filter(|(size, _)| *size > 1);
    let pitch = outer.clone().next_back().map_or(row, |(_, stride)| stride);
    dense(pitch, outer).filter(|_| pitch >= row)?;
    Some(pitch)
}

/// Checks that axes follow each other without gaps, of which the last one has elements `stride`
/// apart; returns the numbers from the beginning of the first one to its end.
fn dense(stride: i64, axes: impl DoubleEndedIterator<Item = (i64, i64)>) -> Option<i64> {
    axes.rev().try_fold(stride, |expected, (size, stride)| {
        (size <= 1 || stride == expected).then_some(expected * size)
    })
}

/// Launches a kernel that has a thread for each vector of `output`'s numbers: `tensors` are
/// `[…, features]` with as many rows, which may lie apart.
pub fn launch_rows(kernels: &KernelFile, name: &str, output: &Tensor, tensors: &[&Tensor]) {
    let pitches: Vec<i64> = tensors.iter().map(|tensor| pitch(tensor, 1)).collect();
    let width = *output.size().last().expect("[…, features]");
    let numbers = vector(&[&pitches[..], &[width]].concat(), tensors, 1);
    let count = output.numel() as i64 / numbers;
    let sizes = [[count], [width]];
    let sizes = sizes.iter().map(|size| Argument::Integers(size));
    let rows = tensors.iter().map(|tensor| Argument::Rows(tensor));
    let arguments: Vec<Argument<'_>> =
        rows.chain(sizes).chain([Argument::Integers(&pitches)]).collect();
    let name = format!("{name}_{}_{numbers}", word(output));
    kernels.launch(output.device(), &name, Extent::threads(count as u64), &arguments);
}

/// Adds up sums over blocks of rows, `partial` `[…, blocks, columns]` in f32, to `[outer, columns]`
/// of `kind`; in f64 and always in one order.
pub fn column_sums(partial: &Tensor, outer: i64, kind: Kind) -> Tensor {
    let columns = *partial.size().last().expect("columns");
    let blocks = partial.numel() as i64 / (outer * columns);
    let sums = Tensor::empty([outer, columns], (kind, partial.device()));
    let extent = Extent {
        block_bytes: (4 * SUMS + 8 * u64::from(THREADS)) as u32,
        ..Extent::blocks(outer * (columns as u64).div_ceil(COLUMNS as u64) as i64, THREADS)
    };
    COLUMN_SUMS.launch(
        partial.device(),
        &format!("column_sums_{}", word(&sums)),
        extent,
        &[
            Argument::Tensor(partial),
            Argument::Tensor(&sums),
            Argument::Integers(&[blocks]),
            Argument::Integers(&[columns]),
        ],
    );
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_narrow_row_has_a_thread_for_each_vector_and_a_wide_one_a_block() {
        let sizes = [(1, 1), (48, 8), (128, 8), (128, 4), (512, 8), (513, 1), (3072, 8)]
            .map(|(width, numbers)| Team::of_row(width, numbers).size());
        assert_eq!(sizes, [1, 8, 16, 32, 32, 256, 256]);
    }

    #[test]
    fn columns_are_summed_as_far_as_a_block_has_room() {
        for (width, times) in [(1, 2), (512, 2), (6144, 2), (12_288, 2), (24_576, 1)] {
            assert_eq!(Team::has_room(width, times), Ok(()), "{width}");
        }
        assert_eq!(Team::has_room(12_800, 2), Err(Misfit::Shape));
    }

    #[test]
    fn vectors_are_read_where_all_tensors_are_aligned() {
        let numbers = Tensor::zeros([65], (Kind::BFloat16, Device::Cpu));
        let (even, odd) = (numbers.narrow(0, 0, 64), numbers.narrow(0, 1, 64));
        assert_eq!(vector(&[64], &[&even], 1), 8);
        assert_eq!(vector(&[60], &[&even], 1), 1);
        assert_eq!(vector(&[64, 60], &[&even], 1), 1);
        assert_eq!(vector(&[64], &[&even, &odd], 2), 2);
    }

    #[test]
    fn rows_of_a_larger_tensor_stay_where_they_are_if_they_lie_equally_far_apart() {
        let whole = Tensor::zeros([2, 3, 20], (Kind::Float, Device::Cpu));
        let part = whole.narrow(2, 4, 12);
        assert_eq!([pitch_of(&whole, 1), pitch_of(&part, 1)], [Some(20); 2]);
        // [2, 3, 4 heads, 3]: a row is a token.
        assert_eq!(pitch_of(&part.unflatten(2, [4, 3]), 2), Some(20));
        assert_eq!(pitch_of(&part.unflatten(2, [4, 3]), 1), None);
        assert_eq!(pitch_of(&part.narrow(1, 0, 2), 1), None);
        assert_eq!(pitch_of(&part.narrow(1, 0, 2).narrow(0, 1, 1), 1), Some(20));
        assert_eq!(pitch_of(&part.narrow(1, 0, 1), 1), Some(60));
        assert_eq!(pitch_of(&part.transpose(1, 2), 1), None);
        assert_eq!(pitch_of(&whole.narrow(1, 0, 1).expand([2, 3, 20], false), 1), None);
        assert_eq!(pitch_of(&whole.select(0, 0).select(0, 0), 1), Some(20));
        let moved = in_rows(Pass::Cuda, 1, part.shallow_clone());
        assert_eq!(moved.data_ptr(), part.data_ptr());
        assert!(in_rows(Pass::Cpu, 1, part).is_contiguous());
    }
}
