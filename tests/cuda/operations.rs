//! Own kernels of operations on a GPU: their numbers, and their time beside its bandwidth.

use std::time::Instant;

use fm_dist::cuda::open_libtorch;
use fm_dist::ops::{
    self, Beside, Bytes, GatedResidual, GeluTanh, ModulatedNorm, Noising, Operation, Pass, Ranges,
    RmsNorm, RotatedNorm, Rounding, SiluGate, SquaredError, Verified, drawn,
};
use tch::{Cuda, Device, Kind, Tensor};

use crate::mpi::operations::kernels_beside_a_cpu;

const GPU: Device = Device::Cuda(0);
/// Share of the bandwidth of a copy that each kernel is to reach at the sizes of FLUX.
const GOAL: f64 = 0.7;
const REPEATS: u32 = 50;

#[test]
#[ignore = "needs a CUDA device"]
fn every_kernel_computes_what_libtorchs_operators_compute() {
    open_libtorch().unwrap();
    let Verified { cases, unfit } = ops::verify(GPU);
    assert!(unfit.is_empty(), "{unfit:#?}");
    assert!(cases >= 60, "{cases}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn kernels_have_the_bits_of_a_cpu_where_sums_have_one_order() {
    open_libtorch().unwrap();
    kernels_beside_a_cpu(GPU);
}

/// Seconds of one of many calls that are queued one after the other.
fn seconds(call: impl Fn()) -> f64 {
    call();
    Cuda::synchronize(0);
    let begin = Instant::now();
    (0..REPEATS).for_each(|_| call());
    Cuda::synchronize(0);
    begin.elapsed().as_secs_f64() / f64::from(REPEATS)
}

/// Bytes a second that a copy within the GPU's memory reads and writes.
fn bandwidth() -> f64 {
    let from = Tensor::ones([1 << 28], (Kind::Float, GPU));
    let into = from.empty_like();
    2.0 * 4.0 * f64::from(1 << 28) / seconds(|| into.shallow_clone().copy_(&from))
}

/// Prints times of an operation in both directions; returns its lower share of the bandwidth.
/// Operations on constants have no backward.
fn share<O: Operation<N>, const N: usize>(operation: O, inputs: [Tensor; N], of: f64) -> f64 {
    let inputs = inputs.map(|input| input.to_device(GPU));
    let Bytes { forward, backward } = operation.least_bytes(inputs.each_ref());
    let computed = || operation.forward(Pass::Cuda, inputs.each_ref().map(Tensor::shallow_clone));
    let grad_output = computed().0.ones_like();
    let once = seconds(|| drop(computed()));
    let both = seconds(|| {
        let (_, saved) = computed();
        drop(operation.backward(Pass::Cuda, saved, grad_output.shallow_clone()));
    });
    let directions = [("forward", forward, once), ("backward", backward, both - once)];
    let moving = directions.into_iter().filter(|(_, bytes, _)| *bytes > 0);
    let shares = moving.map(|(direction, bytes, seconds)| {
        let (share, microseconds) = (bytes as f64 / seconds / of, seconds * 1e6);
        let (name, size) = (O::NAME, inputs[0].size());
        println!(
            "| {name} of {size:?} | {direction} {microseconds:.1} us | {share:.2} of the bandwidth"
        );
        share
    });
    shares.fold(f64::INFINITY, f64::min)
}

#[test]
#[ignore = "needs a CUDA device"]
fn kernels_move_bytes_nearly_as_fast_as_a_copy() {
    open_libtorch().unwrap();
    let of = bandwidth();
    println!("| a copy of 1 GiB | {:.0} GB/s", of / 1e9);
    let kind = Kind::BFloat16;
    // FLUX.1 at 1024 x 1024 pixels, 4096 tokens of images and 512 of text, a batch of 4.
    let [batch, tokens, width] = [4, 4608, 3072];
    let x = || drawn(&[batch, tokens, width], kind, 1);
    let modulation = |scope| drawn(&[batch, 1, width], kind, scope);
    let rounding = Rounding::EachStep;
    let norm_of_rows = ModulatedNorm { epsilon: 1e-6, base: 1.0, rounding };
    let norm = RmsNorm { epsilon: 1e-6, rounding: Rounding::Once };
    let angles = drawn(&[tokens, 1, 64], Kind::Float, 2);
    let table = Tensor::complex(&angles.cos(), &angles.sin());
    let heads = x().view([batch, tokens, 24, 128]);
    let of_head = || drawn(&[128], kind, 3);
    // Wan's latents of 81 frames of 720 x 1280 pixels; those of images are in a GPU's cache.
    let latents = |kind, scope| drawn(&[batch, 16, 21, 90, 160], kind, scope);
    let sigma = drawn(&[batch], Kind::Float, 13).sigmoid();
    let measured = [kind, Kind::Float, kind, kind, Kind::Float].map(|kind| latents(kind, 14));
    let shares = [
        share(GeluTanh, [drawn(&[batch, tokens, 4 * width], kind, 4)], of),
        share(Beside(GeluTanh), [x(), drawn(&[batch, tokens, 4 * width], kind, 4)], of),
        share(SiluGate, [drawn(&[batch, tokens, 6 * width], kind, 4)], of),
        share(GatedResidual { rounding }, [x(), modulation(5), x()], of),
        share(norm_of_rows, [x(), modulation(6), modulation(7)], of),
        share(norm, [heads.shallow_clone(), of_head()], of),
        share(RotatedNorm { norm }, [heads, of_head(), table], of),
        share(norm, [x(), drawn(&[width], kind, 8)], of),
        share(Noising, [latents(kind, 9), latents(Kind::Float, 10), sigma], of),
        share(SquaredError, [latents(kind, 11), latents(Kind::Float, 12)], of),
        share(Ranges, measured, of),
    ];
    assert!(shares.iter().all(|share| *share >= GOAL), "{shares:.2?}, {GOAL} is the goal");
}
