//! The kernels of operations: the compiler of the wheel takes them, they compute what libtorch's
//! operators compute, with the bits of a CPU where sums have one order, and one that computes
//! anything else is found.
//!
//! Without a GPU they run on the double of the driver, a fiber for each thread (`kernels.rs` here).

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::cuda::nvrtc;
use fm_dist::ops::{
    self, Beside, Case, Cut, FeatureOrder, GatedResidual, GeluTanh, Join, ModulatedNorm, Noising,
    Operation, Pass, PassingOn, Ranges, RmsNorm, RotatedNorm, Rotation, Rounding, SiluGate,
    SquaredError, Verified, differentiated_by, differentiated_passing_on_by, drawn, verify_by,
    verify_cases,
};
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::kernels::{doubled_with, on_host};
use crate::double::project;
use crate::oracle::packages::fresh_seed;

/// Of A100, of H100 and H200, of B200, of RTX 50.
const ARCHITECTURES: [u8; 4] = [80, 90, 100, 120];
const ROUNDINGS: [Rounding; 2] = [Rounding::Once, Rounding::EachStep];

/// Makes a library of the texts below `operations`, and runs a program of this file with it.
fn doubled(operations: &Path, program: &str) -> String {
    let folder = TempDir::new().unwrap();
    let definition = format!("-DOPERATIONS={}", operations.display());
    let library = on_host(folder.path(), "operations.cpp", &definition);
    let outcome = doubled_with(
        &format!("mpi::operations::{program}"),
        &library,
        &[("NCCL_DOUBLE_MODULES_STAY", "1")],
    );
    assert_eq!(outcome.code, Some(0), "{}", outcome.output);
    outcome.output
}

#[test]
fn the_compiler_of_the_wheel_takes_every_text_for_each_architecture() {
    let texts = ops::kernel_texts();
    let mut files: Vec<&str> = texts.iter().map(|text| text.file).collect();
    files.sort_unstable();
    let operations = project("src/ops");
    let folders = fs::read_dir(&operations).unwrap().map(|entry| entry.unwrap().file_name());
    let found = folders.filter(|name| operations.join(name).join("kernel.cu").exists());
    let mut found: Vec<String> =
        found.map(|name| format!("{}/kernel.cu", name.to_str().unwrap())).collect();
    found.push("launch/column_sums.cu".into());
    found.sort_unstable();
    assert_eq!(files, found);
    for text in texts {
        for architecture in ARCHITECTURES {
            let code = text.compile(&format!("sm_{architecture}")).unwrap();
            // An ELF file of machine 190, NVIDIA's, for this architecture.
            assert_eq!((&code[..4], code[18]), (&b"\x7fELF"[..], 190), "{}", text.file);
            assert!(code.len() > 1000 && nvrtc::version().is_ok());
        }
    }
}

#[test]
fn every_kernel_computes_what_libtorchs_operators_compute() {
    let output = doubled(&project("src/ops"), "process_that_verifies");
    assert!(output.contains("all are fit in "), "{output}");
}

pub fn process_that_verifies() {
    let Verified { cases, unfit } = verify_by(Pass::Cuda, Device::Cpu);
    assert!(cases >= 50 || !unfit.is_empty(), "{cases}");
    for ops::Unfit { operation, what } in &unfit {
        println!("unfit {operation}: {what}");
    }
    if unfit.is_empty() {
        println!("all are fit in {cases} cases");
    }
}

#[test]
fn kernels_have_the_bits_of_a_cpu_where_sums_have_one_order() {
    let output = doubled(&project("src/ops"), "process_beside_a_cpu");
    assert!(output.contains("compared"), "{output}");
}

use Allowed::{LastPlaces, Nothing, OfNorm};

/// Largest differences that are allowed between a kernel and the loop on a CPU.
#[derive(Clone, Copy)]
enum Allowed {
    Nothing,
    /// Units in the last place of the largest number of a row.
    LastPlaces(f64),
    /// Of a gradient's norm: 1e-6 in f32, 4e-3 in bfloat16.
    OfNorm,
}

impl Allowed {
    fn check(self, found: &Tensor, expected: &Tensor, what: &str) {
        assert_eq!((found.size(), found.kind()), (expected.size(), expected.kind()), "{what}");
        let is_narrow = expected.kind() == Kind::BFloat16;
        let (wide, double) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
        let difference = (wide - &double).abs();
        let (error, bound) = match self {
            Allowed::Nothing => (difference.max().double_value(&[]), 0.0),
            Allowed::LastPlaces(places) => {
                let unit = if is_narrow { 2f64.powi(-7) } else { 2f64.powi(-22) };
                let largest = double.abs().amax([-1i64].as_slice(), true).clamp_min(1e-30);
                ((difference / largest).max().double_value(&[]), places * unit)
            }
            Allowed::OfNorm => {
                let norm = double.norm().double_value(&[]).max(1e-30);
                let bound = if is_narrow { 4e-3 } else { 1e-6 };
                (difference.norm().double_value(&[]) / norm, bound)
            }
        };
        assert!(error <= bound, "{what}: {error:e}, {bound:e} is allowed");
    }
}

/// Where kernels compute, and if their tensors begin in the middle of 16 bytes.
#[derive(Clone, Copy)]
struct Place {
    device: Device,
    is_odd: bool,
}

impl Place {
    fn put(self, numbers: &Tensor) -> Tensor {
        let numbers = numbers.to_device(self.device);
        if !self.is_odd {
            return numbers;
        }
        let length = numbers.numel() as i64;
        let buffer = Tensor::zeros([length + 1], (numbers.kind(), self.device));
        let mut place = buffer.narrow(0, 1, length).view_as(&numbers);
        place.copy_(&numbers);
        place
    }

    /// As [`put`](Self::put), with the rows of the last `axes` axes within larger ones.
    fn put_apart(self, numbers: &Tensor, axes: usize) -> Tensor {
        let sizes = numbers.size();
        let (outer, row) = sizes.split_at(sizes.len() - axes);
        let length: i64 = row.iter().product();
        let before = if self.is_odd { 1 } else { 8 };
        let larger = [outer, &[length + before + 8]].concat();
        let larger = Tensor::full(larger.as_slice(), f64::NAN, (numbers.kind(), self.device));
        let mut place = larger.narrow(-1, before, length).unflatten(-1, row);
        place.copy_(numbers);
        place
    }

    /// Compares a kernel with the loop on a CPU: the output, then the gradient of each input.
    fn compare<O: Operation<N> + std::fmt::Debug, const N: usize>(
        self,
        operation: O,
        inputs: &[Tensor; N],
        allowed: &[Allowed],
    ) {
        let there = inputs.each_ref().map(|input| self.put(input));
        compare_by(differentiated_by, operation, inputs, &there, allowed);
    }

    /// As [`compare`](Self::compare), with the first input passed on to another use.
    fn compare_passing_on<O: PassingOn<N> + std::fmt::Debug, const N: usize>(
        self,
        operation: O,
        inputs: &[Tensor; N],
        allowed: &[Allowed],
    ) {
        let there = inputs.each_ref().map(|input| self.put(input));
        compare_by(differentiated_passing_on_by, operation, inputs, &there, allowed);
    }

    /// As [`compare`](Self::compare), also with some inputs in rows that lie apart, each given with
    /// the number of a row's axes.
    fn compare_apart<O: Operation<N> + std::fmt::Debug, const N: usize>(
        self,
        operation: O,
        apart: &[(usize, usize)],
        inputs: &[Tensor; N],
        allowed: &[Allowed],
    ) {
        self.compare(operation, inputs, allowed);
        let mut there = inputs.each_ref().map(|input| self.put(input));
        for &(number, axes) in apart {
            there[number] = self.put_apart(&inputs[number], axes);
        }
        compare_by(differentiated_by, operation, inputs, &there, allowed);
    }
}

/// Compares what `differentiated` computes by a kernel with what it computes by the loop on a CPU.
/// `there`: the inputs as they lie on the device.
fn compare_by<O: Operation<N> + std::fmt::Debug, const N: usize>(
    differentiated: fn(Pass, O, &[Tensor; N]) -> Vec<Tensor>,
    operation: O,
    inputs: &[Tensor; N],
    there: &[Tensor; N],
    allowed: &[Allowed],
) {
    let found = differentiated(Pass::Cuda, operation, there);
    let expected = differentiated(Pass::Cpu, operation, inputs);
    assert_eq!((found.len(), expected.len()), (allowed.len(), allowed.len()));
    let all = found.iter().zip(&expected).zip(allowed);
    for (number, ((found, expected), allowed)) in all.enumerate() {
        let shapes = inputs.each_ref().map(|input| (input.size(), input.kind()));
        let what = format!("{operation:?} of {shapes:?}, number {number}");
        allowed.check(&found.to_device(Device::Cpu), expected, &what);
    }
}

pub fn process_beside_a_cpu() {
    kernels_beside_a_cpu(Device::Cpu);
    println!("compared");
}

/// Every kernel on `device` beside the loop on a CPU, in all shapes that both take.
pub(crate) fn kernels_beside_a_cpu(device: Device) {
    for kind in [Kind::Float, Kind::BFloat16] {
        for is_odd in [false, true] {
            let place = Place { device, is_odd };
            // One row and many, rows of a part of a warp, a warp and a block, and columns beyond a
            // block's usual memory.
            for shape in [[1, 1, 16], [2, 70, 48], [3, 9, 512], [1, 37, 1536], [2, 3, 6144]] {
                compare_rows(place, kind, shape);
            }
            for shape in [[1, 1, 2], [5, 3, 24], [33, 2, 128]] {
                compare_heads(place, kind, shape);
            }
            for patch in [[1, 2, 2], [2, 3, 1]] {
                compare_patches(place, kind, patch);
            }
            for shape in [&[1][..], &[3, 37], &[2, 7, 4, 6], &[2, 16, 3, 20, 36]] {
                compare_latents(place, kind, shape);
            }
        }
    }
}

fn compare_rows(place: Place, kind: Kind, [batch, tokens, width]: [i64; 3]) {
    let of_tokens = |scope| drawn(&[batch, tokens, width], kind, scope);
    place.compare(GeluTanh, &[of_tokens(1) * 3.0], &[Nothing, Nothing]);
    place.compare_apart(SiluGate, &[(0, 1)], &[of_tokens(1) * 3.0], &[Nothing, Nothing]);
    let first = drawn(&[batch, tokens, 24], kind, 14);
    let both = [first, of_tokens(1) * 3.0];
    place.compare_apart(Beside(GeluTanh), &[(0, 1), (1, 1)], &both, &[Nothing; 3]);
    place.compare_apart(Beside(SiluGate), &[(0, 1), (1, 1)], &both, &[Nothing; 3]);
    for rounding in ROUNDINGS {
        let of_modulation = if rounding == Rounding::Once { Kind::Float } else { kind };
        for shape in [vec![batch, 1, width], vec![width]] {
            let [scale, shift] = [2, 3].map(|scope| drawn(&shape, of_modulation, scope));
            let gated = [of_tokens(4), scale.shallow_clone(), of_tokens(5)];
            let allowed = [Nothing, Nothing, OfNorm, Nothing];
            place.compare_apart(GatedResidual { rounding }, &[(1, 1)], &gated, &allowed);
            let norm = ModulatedNorm { epsilon: 1e-6, base: batch as f64 - 1.0, rounding };
            let near = [LastPlaces(2.0), LastPlaces(2.0), OfNorm, OfNorm];
            let inputs = [of_tokens(6) * 2.0 + 0.5, scale, shift];
            place.compare_apart(norm, &[(1, 1), (2, 1)], &inputs, &near);
            place.compare_passing_on(norm, &inputs, &near);
        }
        let inputs = [of_tokens(7) * 3.0, drawn(&[width], kind, 8)];
        let near = [LastPlaces(2.0), LastPlaces(2.0), OfNorm];
        place.compare(RmsNorm { epsilon: 1e-6, rounding }, &inputs, &near);
    }
}

fn compare_heads(place: Place, kind: Kind, [tokens, heads, width]: [i64; 3]) {
    let angles = drawn(&[tokens, 1, width / 2], Kind::Float, 9);
    let table = Tensor::complex(&angles.cos(), &angles.sin());
    let x = drawn(&[2, tokens, heads, width], kind, 10);
    place.compare(Rotation, &[x.shallow_clone(), table.shallow_clone()], &[Nothing, Nothing]);
    // A CPU's rows are whole vectors.
    for of_weight in [width, heads * width].into_iter().filter(|width| width % 16 == 0) {
        for rounding in ROUNDINGS {
            let weight = drawn(&[of_weight], kind, 11);
            let inputs = [x.shallow_clone(), weight, table.shallow_clone()];
            let norm = RmsNorm { epsilon: 1e-6, rounding };
            // A neighbour of what is rotated moves both numbers of its pair.
            let near = [LastPlaces(3.0), LastPlaces(3.0), OfNorm];
            place.compare_apart(RotatedNorm { norm }, &[(0, 2)], &inputs, &near);
        }
    }
}

fn compare_patches(place: Place, kind: Kind, patch: [i64; 3]) {
    let [frames, rows, columns] = [2 * patch[0], 3 * patch[1], 5 * patch[2]];
    let latents = drawn(&[2, 7, frames, rows, columns], kind, 12);
    place.compare(Cut { patch }, &[latents], &[Nothing, Nothing]);
    for order in [FeatureOrder::ChannelFirst, FeatureOrder::ChannelLast] {
        let features = 7 * patch.iter().product::<i64>();
        let join = Join { patch, grid: [2, 3, 5], order };
        place.compare(join, &[drawn(&[2, 30, features], kind, 13)], &[Nothing, Nothing]);
    }
}

/// The flow-matching step around the model.
fn compare_latents(place: Place, kind: Kind, shape: &[i64]) {
    let numbers = |kind, scope| drawn(shape, kind, scope);
    let sigma = drawn(&shape[..1], Kind::Float, 17).sigmoid();
    let noise = || numbers(Kind::Float, 16);
    place.compare(Noising, &[numbers(kind, 15), noise(), sigma], &[Nothing]);
    place.compare(SquaredError, &[numbers(kind, 18), noise()], &[Nothing; 2]);
    let measured =
        [numbers(kind, 15), noise(), numbers(kind, 19), numbers(kind, 18) * 9.0, noise() - 3.0];
    place.compare(Ranges, &measured, &[Nothing]);
}

#[test]
fn shapes_that_no_cpu_takes_are_libtorchs_operation() {
    let output = doubled(&project("src/ops"), "process_with_odd_shapes");
    assert!(output.contains("sound at all widths"), "{output}");
}

/// Widths that are no whole vectors, new ones each time.
pub fn process_with_odd_shapes() {
    let seed = fresh_seed("odd widths").parse().unwrap();
    let draws = || Vec::<i64>::try_from(Tensor::randint(1400, [8], (Kind::Int64, Device::Cpu)));
    let widths = Key::new(seed, Purpose::Test).seeded(draws).unwrap();
    let verified = |outcome: Result<usize, String>| {
        outcome.unwrap_or_else(|what| panic!("{what}"));
    };
    for width in widths.into_iter().map(|width| width + 1).chain([1, 3]) {
        for (kind, tolerance) in [(Kind::Float, 3e-6), (Kind::BFloat16, 1.6e-2)] {
            for rounding in ROUNDINGS {
                let of_modulation = if rounding == Rounding::Once { Kind::Float } else { kind };
                let x = drawn(&[2, 19, width], kind, 1);
                let rows = [2, 3].map(|scope| drawn(&[2, 1, width], of_modulation, scope));
                let [scale, shift] = rows;
                let gated =
                    [x.shallow_clone(), scale.shallow_clone(), drawn(&[2, 19, width], kind, 4)];
                let operation = GatedResidual { rounding };
                let case = Case { operation, inputs: gated, tolerance };
                verified(verify_cases(Pass::Cuda, Device::Cpu, &[case]));
                // The variance of one number is nothing.
                if width > 2 {
                    let operation = ModulatedNorm { epsilon: 1e-6, base: 1.0, rounding };
                    let inputs = [x.shallow_clone(), scale, shift];
                    let case = Case { operation, inputs, tolerance };
                    verified(verify_cases(Pass::Cuda, Device::Cpu, &[case]));
                }
                // A row of one number has no direction, and a gradient of nothing.
                if width > 1 {
                    let operation = RmsNorm { epsilon: 1e-6, rounding };
                    let inputs = [x, drawn(&[width], kind, 5)];
                    let case = Case { operation, inputs, tolerance };
                    verified(verify_cases(Pass::Cuda, Device::Cpu, &[case]));
                }
            }
            let case =
                Case { operation: GeluTanh, inputs: [drawn(&[width], kind, 6) * 4.0], tolerance };
            verified(verify_cases(Pass::Cuda, Device::Cpu, &[case]));
            let inputs = [drawn(&[3, 2 * width], kind, 7) * 4.0];
            let case = Case { operation: SiluGate, inputs, tolerance };
            verified(verify_cases(Pass::Cuda, Device::Cpu, &[case]));
        }
    }
    println!("sound at all widths");
}

/// The texts of all kernels, of which one is changed.
fn changed(folder: &Path, file: &str, right: &str, wrong: &str) -> PathBuf {
    let operations = project("src/ops");
    for text in ops::kernel_texts().iter().map(|text| text.file).chain(["launch/prelude.cu"]) {
        let mut content = fs::read_to_string(operations.join(text)).unwrap();
        if text == file {
            assert!(content.contains(right), "{right}");
            content = content.replace(right, wrong);
        }
        let path = folder.join(text);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    folder.to_path_buf()
}

#[test]
fn a_kernel_that_computes_something_else_is_found() {
    let norms = &["modulated_norm", "rms_norm"][..];
    for (file, right, wrong, unfit) in [
        ("gelu_tanh/kernel.cu", "fmaf(3.0f * CUBE * x", "fmaf(2.0f * CUBE * x", &["gelu_tanh"][..]),
        (
            "silu_gate/kernel.cu",
            "from[of_row + column]",
            "from[column]",
            &["silu_gate", "silu_gate_beside"],
        ),
        ("gelu_tanh/kernel.cu", "row * pitches.of[1]", "row * width", &["gelu_tanh_beside"]),
        ("launch/prelude.cu", "sign * angles", "angles", &["rotation", "rotated_norm"]),
        ("rms_norm/kernel.cu", "place * N % head", "place * N", &["rotated_norm"]),
        ("patches/kernel.cu", "in_patch[1] * places.strides[2]", "in_patch[1]", &["cut", "join"]),
        (
            "gated_residual/kernel.cu",
            "place / of_row / (unsigned int)sharing",
            "0",
            &["gated_residual"],
        ),
        ("rms_norm/kernel.cu", "- normalized * mean", "- mean", &["rms_norm"]),
        (
            "modulated_norm/kernel.cu",
            "inverse * (scaled - gradient_mean",
            "inverse * (scaled + gradient_mean",
            &["modulated_norm"],
        ),
        (
            "modulated_norm/kernel.cu",
            "vectors<N>(passed + row * width)",
            "vectors<N>(passed)",
            &["modulated_norm"],
        ),
        ("noising/kernel.cu", "(unsigned int)of_sample / N", "count", &["noising"]),
        ("squared_error/kernel.cu", "2.0f * (", "1.0f * (", &["squared_error"]),
        (
            "ranges/kernel.cu",
            "place[parts] = range.greatest",
            "place[parts] = range.least",
            &["ranges"],
        ),
        ("ranges/kernel.cu", "distance = WARP / 2", "distance = WARP / 4", &["ranges"]),
        ("launch/column_sums.cu", "block += lanes", "block += 2 * lanes", &["gated_residual"]),
        ("launch/prelude.cu", "(bits >> 16 & 1)", "0", norms),
    ] {
        let folder = TempDir::new().unwrap();
        let output = doubled(&changed(folder.path(), file, right, wrong), "process_that_verifies");
        for operation in unfit {
            assert!(
                output.contains(&format!("unfit {operation}: {operation} of ")),
                "{wrong}: {output}"
            );
        }
    }
}
