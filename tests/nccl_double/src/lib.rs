//! A contract double of NCCL, of the CUDA driver and of NVML: the C interface of what fm-dist calls
//! of them, on host memory, between processes of one machine. It lets the real
//! `src/collective/nccl/mod.rs` run where no GPU is, and it is strict where the real libraries are
//! lax: what there is a race, a hang or a leak on some day is here one line and exit code 97, on
//! every day.
//!
//! # How to use it
//! `cargo build --manifest-path tests/nccl_double/Cargo.toml` makes `libnccl_double.so`. A folder
//! with symbolic links to it, `libcuda.so`, `libnccl.so` and `libnvidia-ml.so.1`, serves as
//! `LD_LIBRARY_PATH`. They must be links to one file, so that the loader loads it once. Programs
//! hand CPU memory to it as if it were a GPU's.
//!
//! # Model
//! The compute stream (null handle) is the program itself: what it is given is done. Any other
//! stream is a queue of recorded operations, waits and event records; nothing runs in the
//! background. An operation posts its input in a file of the communicator's folder when it is
//! launched. Looking at an event advances queues as far as data are there; a wait of the compute
//! stream for an event blocks until they are, because afterwards a CPU reads. Sums are the pairwise
//! tree over the ranks, `(0+1)+(2+3)`, rounded to the elements' kind after each addition, as in
//! fm-dist's other backends. Kinds: f32, f64, bf16, i64; reductions: sum, min, max.
//!
//! # What it checks
//! Between ranks: equal operations in equal order with equal counts, types, reductions, roots and
//! groups, on the same communicator, in the same order across communicators that ranks share; equal
//! sizes of communicators; no GPU twice.
//!
//! Memory: from launch to completion an input stays as it is and an output is not touched (it is
//! filled with NaN, so that a reader comes to harm); nothing is freed meanwhile; operations under
//! way do not overlap; overlaps of input and output are NCCL's in-place ones. Each launch on a side
//! stream comes after a wait for an event that the compute stream recorded after the one of the
//! launch before.
//!
//! Blocking: communicators are non-blocking (`blocking = 0`); after each call on one,
//! `ncclCommGetAsyncError` is polled until it says something else than in progress, before the
//! communicator is used again and before an event is recorded behind the operation; a communicator
//! is finalized and polled before it is destroyed; functions that make the host wait are not there
//! to be called.
//!
//! Kernels: a module is machine code for the GPU's architecture, a function is one of its kernels
//! and not used after it; a launch is on the compute stream, of the device that is current, with
//! arguments that can be read at the parameters' sizes, without shared memory, within CUDA's limits
//! of blocks and threads. The code is not run: a function for CPUs runs in its place.
//!
//! Copies from the host: in a side stream, behind a wait for the compute stream as a launch is,
//! from memory of `cuMemHostAlloc`; until one is done, its output is not touched.
//!
//! Ends: every operation is waited for by the compute stream; groups are closed; events, streams,
//! communicators and modules are destroyed, once, and not used after that, nor after an abort, nor
//! after an error except by an abort. Leaks are looked for when the process exits with code 0: one
//! that fails or is aborted leaves what it had.
//!
//! # Switches
//! A rank `R` is one of the first communicator; operations `K` are counted from 0 over all
//! communicators of the process.
//!
//! | variable | effect |
//! |---|---|
//! | `NCCL_DOUBLE_DELAY_MS=n` | each operation takes so long after the last rank has launched it |
//! | `NCCL_DOUBLE_SHUFFLE=seed` | and up to 10 ms or twice the delay more, so that streams finish in an order of the seed's |
//! | `NCCL_DOUBLE_STUCK_INIT=R` | rank R never joins a communicator: all its ranks are in progress for ever |
//! | `NCCL_DOUBLE_STUCK_OPERATION=R:K` | rank R's launch of operation K is in progress for ever |
//! | `NCCL_DOUBLE_ERROR=R:K` | polls of rank R's launch of operation K end in `ncclSystemError` |
//! | `NCCL_DOUBLE_LATE_ERROR=R:K` | the launch succeeds, the next poll reports `ncclRemoteError`, data never come |
//! | `NCCL_DOUBLE_KERNEL_ERROR=K:CODE` | the program's own launch K (from 0) of a kernel ends with the driver's error CODE, and so does all that follows, unless memory ran out (2) |
//! | `NCCL_DOUBLE_DEVICE_ERROR=R:K` | rank R's operation K breaks the GPU: the driver answers everything with an illegal memory access |
//! | `NCCL_DOUBLE_LOAD_ERROR=CODE` | no module can be loaded: the driver's error CODE |
//! | `NCCL_DOUBLE_ECC_ERRORS=n` | uncorrected errors that NVML counts; rows wait to be remapped |
//! | `NCCL_DOUBLE_XID=n` | the critical error that NVML tells of a GPU that failed |
//! | `NCCL_DOUBLE_NVML_HANGS=1` | NVML never answers |
//! | `NCCL_DOUBLE_ABORT_HANGS=1` | `ncclCommAbort` never returns |
//! | `NCCL_DOUBLE_GPUS=n` | number of GPUs; 8 without it |
//! | `NCCL_DOUBLE_SAME_GPU=1` | all ordinals are one GPU, with one UUID |
//! | `NCCL_DOUBLE_PATIENCE_MS=n` | a compute stream that has waited so long ends the process; 60000 without it |
//! | `NCCL_DOUBLE_KERNELS=path` | library that has `<name>_on_host` for each kernel that is launched |
//! | `NCCL_DOUBLE_MODULES_STAY=1` | modules may be loaded still when the process ends |
//! | `NCCL_DOUBLE_ARCHITECTURE=n` | ten times the GPUs' compute capability; 90 without it |
//! | `NCCL_DOUBLE_FOLDER=path` | where communicators' folders are made; memory or the temporary folder without it |
//!
//! # What it cannot show
//! - Races of real GPU memory. The compute stream is never behind the program, so a kernel that
//!   still writes an input when its event has been recorded too early, or a block that libtorch's
//!   allocator hands out too soon, goes unseen.
//! - A read of an input by the program while it is under way is allowed, also where a GPU would see
//!   it half written.
//! - NCCL's own algorithms and their order of sums: real losses differ from the double's in
//!   rounding.
//! - What machine code computes, where it reads and writes, and how fast: the compiler's work is
//!   seen by GPUs only.
//! - Races between the threads of a block: they take turns at barriers and shuffles alone, in one
//!   order.
//! - Topology, NVLink, networks, more than one machine, performance of any sort; times of events
//!   are those of a model.
//! - Deadlocks by the launch order of kernels, by full queues, or by NCCL's use of the device's
//!   processors: input is posted at the launch, so an operation here needs nothing but the launches
//!   of all ranks.
//! - What NCCL does after errors of its own: here an error comes when a switch asks for it, and an
//!   abort always succeeds or always hangs.
//! - Whether libtorch's primary context and the trainer's are one, and whether the real libraries
//!   have these functions with these signatures (`tests/cuda.rs` shows that on a machine with
//!   GPUs).

mod board;
mod clock;
pub mod copy;
pub mod cuda;
mod device;
mod element;
mod failure;
mod hope;
mod leaks;
mod memory;
mod module;
pub mod nccl;
pub mod nvml;
mod operation;
mod switches;
mod table;
mod world;

#[cfg(test)]
mod tests;
