//! What only a GPU can show, on all GPUs of this machine: `launch/test-gpu.sh` runs these tests and
//! prints a table.
//!
//! Worlds run as children: a test starts `mpirun` with this very binary as one of its programs, or
//! with fm-dist.

/// Backends of attention are tried before they are used.
mod attention;
/// Noise and timesteps on a GPU are those of the generator that the configuration names, and a step
/// hardly waits for them.
mod draws;
/// Failing devices, and memory that runs out, are told by name.
pub mod failures;
/// bfloat16 steps of all families are a CPU's float32 steps within rounding.
mod families;
/// Runs take the memory that `fm-dist check` says.
mod memory;
/// Kernels of operations have a CPU's numbers, and nearly the speed of a copy.
mod operations;
/// Steps are those of NeMo AutoModel and diffusers on the same GPU.
mod parity;

use std::path::Path;

use fm_dist::collective::{
    self, Collective, Issued, Limits, Nccl, ReduceOp, Sliced, Spent, Work, local_rank,
};
use fm_dist::cuda::open_libtorch;
use fm_dist::error::Result;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::contract::{brought, contract, expected};
use crate::mpi::kernels::gives_the_bits_of_a_cpu;
use crate::runs::{column, finish, mpirun, with_sets};
use crate::worlds::{Outcome, end_with, join_the_world, run, world_of};

/// Kernels of GPUs add in other orders than those of CPUs: their rounding, grown over fifty steps
/// of training. Two CPUs are granted 2e-3 over thirty (`tests/threads/golden.rs`).
const OTHER_DEVICE: f64 = 1e-2;

/// Share of the communication that may hold computation up. Of eighteen stages all but the first to
/// go forward have a stage before them that computes meanwhile; the rest is for the statistics and
/// for what a link slower than NVLink leaves over.
const EXPOSED: f64 = 0.5;

/// 306 million parameters, whose state is nearly all that a run holds.
const LARGE: [&str; 5] = [
    "model.dit.width=1024",
    "model.dit.depth=16",
    "sampling.num_steps=1",
    "checkpoint.every_n_steps=1000",
    "parallel.device=\"cuda\"",
];

fn num_gpus() -> usize {
    use cudarc::driver::result;
    result::init().expect("a CUDA driver with a GPU");
    result::device::get_count().expect("an initialized driver counts its GPUs") as usize
}

/// NCCL with tensors that begin and end on the CPU: the body of the contract is the same for all
/// backends.
struct ByGpu {
    nccl: Nccl,
    device: Device,
}

impl ByGpu {
    /// The world of `mpirun`, and NCCL on top of it.
    fn join() -> (Box<dyn Collective>, Self) {
        let control = join_the_world();
        let joined = open_libtorch().and_then(|()| {
            let device = Device::Cuda(local_rank(&*control)?);
            Ok(ByGpu { nccl: Nccl::connect(&*control, device, Limits::default())?, device })
        });
        (control, joined.unwrap_or_else(|error| end_with(&error)))
    }

    /// Contiguous or not, as it was.
    fn up(&self, tensor: &Tensor) -> Tensor {
        let there = tensor.to_device(self.device);
        if tensor.is_contiguous() { there } else { there.tr().contiguous().tr() }
    }

    /// Runs an operation on copies; the results come back when it has been waited for.
    fn there_and_back(
        &self,
        tensors: Vec<Tensor>,
        start: impl FnOnce(&Nccl, Vec<Tensor>) -> Result<Work>,
    ) -> Result<Work> {
        let copies: Vec<Tensor> = tensors.iter().map(|tensor| self.up(tensor)).collect();
        let work = start(&self.nccl, copies.iter().map(Tensor::shallow_clone).collect())?;
        Ok(Work::new(move || {
            work.wait()?;
            tensors.into_iter().zip(&copies).for_each(|(mut tensor, copy)| tensor.copy_(copy));
            Ok(())
        }))
    }
}

/// `(owned, full)` of each, one after the other, and back.
fn flat(tensors: Vec<Sliced>) -> Vec<Tensor> {
    tensors.into_iter().flat_map(|Sliced { owned, full }| [owned, full]).collect()
}

fn paired(tensors: Vec<Tensor>) -> Vec<Sliced> {
    let pair =
        |pair: &[Tensor]| Sliced { owned: pair[0].shallow_clone(), full: pair[1].shallow_clone() };
    tensors.chunks(2).map(pair).collect()
}

impl Collective for ByGpu {
    fn rank(&self) -> usize {
        self.nccl.rank()
    }

    fn world_size(&self) -> usize {
        self.nccl.world_size()
    }

    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work> {
        self.there_and_back(buffers, |nccl, buffers| nccl.all_reduce(buffers, op))
    }

    /// The whole stays here: an owned view of it would be written over by what a reduction leaves
    /// there.
    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        let fulls: Vec<Tensor> = tensors.iter().map(|sliced| self.up(&sliced.full)).collect();
        let owned = tensors.into_iter().map(|sliced| sliced.owned).collect();
        self.there_and_back(owned, |nccl, owned| {
            nccl.reduce_scatter(
                owned.into_iter().zip(fulls).map(|(owned, full)| Sliced { owned, full }).collect(),
                op,
            )
        })
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        self.there_and_back(flat(tensors), |nccl, tensors| nccl.all_gather(paired(tensors)))
    }

    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work> {
        self.there_and_back(vec![buffer], |nccl, mut buffers| {
            nccl.broadcast(buffers.remove(0), root)
        })
    }

    fn barrier(&self) -> Result<()> {
        self.nccl.barrier()
    }

    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        self.nccl.split(color)
    }

    fn carries(&self, device: Device) -> bool {
        self.nccl.carries(device)
    }

    fn spent(&self) -> Spent {
        self.nccl.spent()
    }

    fn issued(&self) -> Issued {
        self.nccl.issued()
    }
}

/// A program of this file, on as many GPUs.
fn on_gpus(ranks: usize, program: &str, said: &str) {
    let Outcome { code, output, .. } = run(world_of(ranks), program);
    assert_eq!(code, Some(0), "{output}");
    for rank in 0..ranks {
        assert!(output.contains(&format!("rank {rank} of {ranks} {said}")), "{output}");
    }
}

fn leave((control, world): (Box<dyn Collective>, ByGpu), said: &str) {
    println!("rank {} of {} {said}", world.rank(), world.world_size());
    drop(world);
    collective::finish(control).unwrap_or_else(|error| end_with(&error));
}

#[test]
#[ignore = "needs a CUDA device"]
fn worlds_of_any_number_of_gpus_keep_the_contract() {
    for ranks in 1..=num_gpus() {
        on_gpus(ranks, "cuda::rank_of_the_contract", "kept the contract");
    }
}

pub fn rank_of_the_contract() {
    let world = ByGpu::join();
    let kept =
        contract(&world.1).and_then(|()| halves(&world.1)).and_then(|()| slices_in_place(&world.1));
    kept.unwrap_or_else(|error| end_with(&error));
    leave(world, "kept the contract");
}

/// bf16 is summed by NCCL itself; these sums are exact in it.
fn halves(world: &ByGpu) -> Result<()> {
    let buffer = brought(world.rank(), 1000, Kind::BFloat16).remainder(8);
    world.all_reduce(vec![buffer.shallow_clone()], ReduceOp::Sum)?.wait()?;
    let all = (0..world.world_size())
        .map(|rank| brought(rank, 1000, Kind::Float).remainder(8))
        .sum::<Tensor>();
    assert!(buffer.to_kind(Kind::Float).equal(&all));
    Ok(())
}

/// A rank's slice as a view of the whole, in the GPU's own memory.
fn slices_in_place(world: &ByGpu) -> Result<()> {
    let (rank, size) = (world.rank() as i64, 1000 * world.world_size() as i64);
    let full = brought(world.rank(), size, Kind::Float).to_device(world.device);
    let both = || Sliced { owned: full.narrow(0, rank * 1000, 1000), full: full.shallow_clone() };
    world.nccl.reduce_scatter(vec![both()], ReduceOp::Sum)?.wait()?;
    world.nccl.all_gather(vec![both()])?.wait()?;
    assert!(full.to_device(Device::Cpu).equal(&expected(
        world.world_size(),
        size,
        Kind::Float,
        ReduceOp::Sum
    )));
    Ok(())
}

/// `launch/test-gpu.sh` runs this one under compute-sanitizer too.
#[test]
#[ignore = "needs a CUDA device"]
fn what_is_computed_before_and_after_a_collective_keeps_its_place() {
    for ranks in 1..=num_gpus() {
        on_gpus(ranks, "cuda::rank_that_computes_around_collectives", "kept the order");
    }
}

pub fn rank_that_computes_around_collectives() {
    let world = ByGpu::join();
    (0..30)
        .try_for_each(|turn| computes_around(&world.1, turn))
        .unwrap_or_else(|error| end_with(&error));
    leave(world, "kept the order");
}

/// The input is written by kernels that are still queued when the collective starts, and the result
/// is read by kernels queued after the wait; meanwhile memory is let go and asked for again.
fn computes_around(world: &ByGpu, turn: i64) -> Result<()> {
    let size = 1 << 20;
    let slow = Tensor::ones([1024, 1024], (Kind::Float, world.device));
    let zero = (0..20)
        .fold(slow.shallow_clone(), |product, _| product.matmul(&slow) / 1024.0)
        .mean(Kind::Float)
        - 1.0;
    let buffer = brought(world.rank(), size, Kind::Float).to_device(world.device)
        + turn as f64
        + zero.round();
    let work = world.nccl.all_reduce(vec![buffer.shallow_clone()], ReduceOp::Sum)?;
    for _ in 0..5 {
        drop(Tensor::full([size], 1e9, (Kind::Float, world.device)));
    }
    work.wait()?;
    let doubled = &buffer * 2.0;
    // The block of the buffer is given out again, behind the kernel that reads it.
    drop(buffer);
    drop(Tensor::full([size], 1e9, (Kind::Float, world.device)));
    let sum = expected(world.world_size(), size, Kind::Float, ReduceOp::Sum)
        + (turn * world.world_size() as i64) as f64;
    assert!(doubled.to_device(Device::Cpu).equal(&(sum * 2.0)), "turn {turn}");
    Ok(())
}

/// `launch/test-gpu.sh` runs this one under compute-sanitizer too.
#[test]
#[ignore = "needs a CUDA device"]
fn the_kernel_of_adamw_gives_a_gpu_the_bits_of_a_cpu() {
    open_libtorch().unwrap();
    for ordinal in 0..num_gpus() {
        gives_the_bits_of_a_cpu(Device::Cuda(ordinal));
    }
}

/// Trains with the program and returns the run folder.
fn trained(ranks: usize, root: &Path, name: &str, overrides: &[&str]) -> std::path::PathBuf {
    let run = root.join(name);
    let output = format!("output_dir={}", run.display());
    let arguments = with_sets(&["train"], &[overrides, &[&output]].concat());
    let (code, _, told) = finish(mpirun(ranks, &arguments));
    assert_eq!(code, 0, "{told}");
    run
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_digits_run_has_the_loss_curve_of_a_cpu_on_any_number_of_gpus() {
    let root = TempDir::new().unwrap();
    let on_cpu = column(&trained(1, root.path(), "cpu", &["max_steps=50"]), "loss");
    assert_eq!(on_cpu.len(), 50);
    for ranks in [1, 2, 4].into_iter().filter(|ranks| *ranks <= num_gpus()) {
        let run = trained(
            ranks,
            root.path(),
            &format!("gpu-{ranks}"),
            &["max_steps=50", "parallel.device=\"cuda\""],
        );
        let on_gpu = column(&run, "loss");
        assert_eq!(on_gpu.len(), on_cpu.len());
        for ((step, expected), (_, loss)) in on_cpu.iter().zip(&on_gpu) {
            assert!(
                (loss - expected).abs() <= OTHER_DEVICE * expected,
                "{ranks} GPUs, step {step}: loss {loss}, on a CPU {expected}"
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn collectives_between_gpus_hide_behind_computation() {
    let ranks = num_gpus();
    assert!(ranks > 1, "this machine has one GPU: there is nothing to hide");
    let root = TempDir::new().unwrap();
    let batch = format!("train.global_batch_size={}", 128 * ranks);
    let overrides =
        [&LARGE[..], &["max_steps=10", "data.micro_batch_size_per_gpu=128", &batch]].concat();
    let run = trained(ranks, root.path(), "overlap", &overrides);
    // The first steps choose kernels and connect channels.
    let seconds =
        |name: &str| column(&run, name).iter().skip(3).map(|(_, seconds)| seconds).sum::<f64>();
    let (communication, exposed) = (seconds("communication_seconds"), seconds("exposed_seconds"));
    println!("communication {communication:.4} s, of which exposed {exposed:.4} s");
    assert!(
        communication > 0.0 && exposed <= EXPOSED * communication,
        "exposed {exposed} s of {communication} s"
    );
}
