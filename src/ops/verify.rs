//! Comparison of every single pass with libtorch's operators.

use tch::{Device, Kind, Tensor};

use super::launch::COLUMN_SUMS;
use super::{Operation, Pass, PassingOn, fits, single_pass, single_pass_passing_on};
use crate::libtorch::gradients;
use crate::rng::{Key, Purpose};

/// An operation with inputs to try it on.
pub struct Case<O, const N: usize> {
    pub operation: O,
    pub inputs: [Tensor; N],
    /// Largest allowed error of an output or gradient, relative to its largest number: a few
    /// roundings of the inputs' kind.
    pub tolerance: f64,
}

/// One of so many numbers may round to its neighbour in bfloat16, where a pass and libtorch's
/// operators sum in another order.
const NUMBERS_A_NEIGHBOUR: usize = 500;
/// Share of the largest number below which roundings are not compared: where a small number is the
/// difference of large ones, libtorch's operators have lost digits that a pass may keep.
const SMALL: f64 = 0.01;

/// Findings of [`verify`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Cases in which a pass computed what libtorch's operators compute.
    pub cases: usize,
    pub unfit: Vec<Unfit>,
}

/// An operation whose single pass is not to be taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Unfit {
    pub operation: &'static str,
    /// The case in which it differs, with the number by which it does; or what the compiler says.
    pub what: String,
}

impl Verified {
    pub(super) fn add(&mut self, operation: &'static str, cases: Result<usize, String>) {
        match cases {
            Ok(cases) => self.cases += cases,
            Err(what) => self.unfit.push(Unfit { operation, what }),
        }
    }
}

/// Verifies every operation that has a single pass on `device` against libtorch's operators:
/// output and gradients against those in f64, outputs in bfloat16 against those in bfloat16, so
/// that roundings are where they belong. There are no cases for a device without single passes.
pub fn verify(device: Device) -> Verified {
    Pass::on(device).map_or_else(Verified::default, |pass| verify_by(pass, device))
}

/// As [`verify`], by `pass`. With [`Pass::Cuda`] and `Device::Cpu` kernels run on the tests' double
/// of the driver.
pub fn verify_by(pass: Pass, device: Device) -> Verified {
    super::verify_each(pass, device)
}

/// Draws normal numbers of a kind for [`Operation::cases`].
pub fn drawn(shape: &[i64], kind: Kind, scope: u64) -> Tensor {
    let draw = || Tensor::randn(shape, (Kind::Float, Device::Cpu));
    Key::new(11, Purpose::Test).scope(scope).seeded(draw).to_kind(kind)
}

/// Computes by libtorch's operators the outputs that those of a pass are compared with.
type Outputs<O, const N: usize> = fn(O, [&Tensor; N]) -> Vec<Tensor>;
/// Computes the first output of a pass, then the gradients.
type Differentiated<O, const N: usize> = fn(Pass, O, &[Tensor; N]) -> Vec<Tensor>;

/// Verifies one operation; returns the number of cases.
pub fn verify_one<O: Operation<N>, const N: usize>(
    pass: Pass,
    device: Device,
) -> Result<usize, String> {
    compile::<O, N>(pass, device)?;
    verify_cases(pass, device, &O::cases())
}

/// As [`verify_one`], with the first input passed on to another use.
pub fn verify_passing_on<O: PassingOn<N>, const N: usize>(
    pass: Pass,
    device: Device,
) -> Result<usize, String> {
    compile::<O, N>(pass, device)?;
    let expected: Outputs<O, N> =
        |operation, inputs| vec![operation.plain(inputs), inputs[0] * 1.0];
    verify_each_case(pass, device, &O::cases(), differentiated_passing_on_by, expected)
}

/// Verifies cases of an operation; returns their number.
///
/// # Errors
/// The first case in which `pass` differs, with the number by which it does.
pub fn verify_cases<O: Operation<N>, const N: usize>(
    pass: Pass,
    device: Device,
    cases: &[Case<O, N>],
) -> Result<usize, String> {
    let expected: Outputs<O, N> = |operation, inputs| vec![operation.plain(inputs)];
    verify_each_case(pass, device, cases, differentiated_by, expected)
}

/// Compiles the kernels of an operation, if its pass has any.
fn compile<O: Operation<N>, const N: usize>(pass: Pass, device: Device) -> Result<(), String> {
    if pass == Pass::Cuda {
        for kernels in [&COLUMN_SUMS, O::kernels()] {
            kernels.on(device)?;
        }
    }
    Ok(())
}

fn verify_each_case<O: Operation<N>, const N: usize>(
    pass: Pass,
    device: Device,
    cases: &[Case<O, N>],
    found: Differentiated<O, N>,
    expected: Outputs<O, N>,
) -> Result<usize, String> {
    for case in cases {
        let inputs = case.inputs.each_ref().map(|input| input.to_device(device));
        let verified = fits(case.operation, pass, inputs.each_ref())
            .map_err(|misfit| format!("the single pass does not take it: {misfit:?}"))
            .and_then(|()| {
                verify_case(case, &inputs, &found(pass, case.operation, &inputs), expected)
            });
        verified.map_err(|what| {
            let shapes = inputs.each_ref().map(|input| (input.size(), input.kind()));
            format!("{} of {shapes:?} on {device:?}: {what}", O::NAME)
        })?;
    }
    Ok(cases.len())
}

fn verify_case<O: Operation<N>, const N: usize>(
    case: &Case<O, N>,
    inputs: &[Tensor; N],
    found: &[Tensor],
    expected: Outputs<O, N>,
) -> Result<(), String> {
    let operation = case.operation;
    let exact = inputs.each_ref().map(in_double);
    let exact = differentiated(&exact, O::CONSTANTS, |inputs| expected(operation, inputs));
    let names = std::iter::once("the output".to_string())
        .chain((0..).map(|number| format!("the gradient of input {number}")));
    for (name, (found, exact)) in names.zip(found.iter().zip(&exact)) {
        compare(found, exact, case.tolerance).map_err(|what| format!("{name} {what}"))?;
    }
    if inputs[0].kind() == Kind::BFloat16 {
        compare_rounding(&found[0], &operation.plain(inputs.each_ref()))?;
    }
    Ok(())
}

/// Numbers in f64; complex ones as they are.
fn in_double(input: &Tensor) -> Tensor {
    let is_complex = input.kind() == Kind::ComplexFloat;
    if is_complex { input.shallow_clone() } else { input.to_kind(Kind::Double) }
}

/// The output of an operation by `pass`, then the gradient of each input that is no constant, for a
/// drawn gradient of the output. Inputs that the pass does not take are a bug of the caller.
pub fn differentiated_by<O: Operation<N>, const N: usize>(
    pass: Pass,
    operation: O,
    inputs: &[Tensor; N],
) -> Vec<Tensor> {
    differentiated(inputs, O::CONSTANTS, |inputs| vec![single_pass(operation, pass, inputs)])
}

/// As [`differentiated_by`], with a drawn gradient of another use of the first input.
pub fn differentiated_passing_on_by<O: PassingOn<N>, const N: usize>(
    pass: Pass,
    operation: O,
    inputs: &[Tensor; N],
) -> Vec<Tensor> {
    differentiated(inputs, O::CONSTANTS, |inputs| {
        let (passed_on, output) = single_pass_passing_on(operation, pass, inputs);
        vec![output, passed_on]
    })
}

/// The first output of an operation, then the gradient of each input that is no constant, for a
/// drawn gradient of each output.
fn differentiated<const N: usize>(
    inputs: &[Tensor; N],
    constants: [bool; N],
    operation: impl Fn([&Tensor; N]) -> Vec<Tensor>,
) -> Vec<Tensor> {
    let leaf = |number: usize| inputs[number].detach().set_requires_grad(!constants[number]);
    let leaves: [Tensor; N] = std::array::from_fn(leaf);
    let outputs = operation(leaves.each_ref());
    let given: Vec<Tensor> = outputs.iter().zip(99..).map(drawn_gradient).collect();
    let trained: Vec<&Tensor> = leaves.iter().filter(|leaf| leaf.requires_grad()).collect();
    let [outputs_of, given_of] =
        [&outputs, &given].map(|tensors| tensors.iter().collect::<Vec<_>>());
    let found =
        if trained.is_empty() { vec![] } else { gradients(&outputs_of, &given_of, &trained) };
    [outputs[0].detach()].into_iter().chain(found).collect()
}

/// A gradient of an output; numbers that are the same in every kind.
fn drawn_gradient((output, scope): (&Tensor, u64)) -> Tensor {
    drawn(&output.size(), Kind::BFloat16, scope).to_kind(output.kind()).to_device(output.device())
}

/// Compares numbers with those in f64.
fn compare(found: &Tensor, expected: &Tensor, tolerance: f64) -> Result<(), String> {
    if found.size() != expected.size() {
        return Err(format!("has shape {:?} and not {:?}", found.size(), expected.size()));
    }
    let largest = |tensor: Tensor| tensor.abs().max().double_value(&[]);
    let scale = largest(expected.shallow_clone()).max(f64::MIN_POSITIVE);
    let error = largest(found.to_kind(Kind::Double) - expected) / scale;
    // A NaN is not below anything.
    if error <= tolerance {
        return Ok(());
    }
    Err(format!(
        "is off by {error:.1e} of its largest number from libtorch's operators, \
         {tolerance:.1e} is allowed"
    ))
}

/// Compares an output in bfloat16 with libtorch's operators number by number.
fn compare_rounding(found: &Tensor, plain: &Tensor) -> Result<(), String> {
    let size = plain.abs();
    let counts = size.ge_tensor(&(size.max() * SMALL));
    let different = found.ne_tensor(plain).logical_and(&counts);
    let different = different.sum(Kind::Int64).int64_value(&[]) as usize;
    let allowed = found.numel() / NUMBERS_A_NEIGHBOUR + 1;
    if different <= allowed {
        return Ok(());
    }
    let all = found.numel();
    Err(format!(
        "rounds otherwise than libtorch's operators: {different} of {all} numbers differ, \
         {allowed} may"
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::ops::launch::KernelFile;
    use crate::ops::{Bytes, GeluTanh, Misfit};

    #[test]
    fn every_single_pass_of_a_cpu_is_libtorchs_operation() {
        let Verified { cases, unfit } = verify(Device::Cpu);
        assert!(cases >= 30 && unfit.is_empty(), "{cases}, {unfit:?}");
    }

    #[test]
    fn a_device_without_single_passes_has_none_to_verify() {
        assert_eq!(verify(Device::Mps), Verified::default());
    }

    #[test]
    fn every_folder_of_an_operation_is_verified() {
        let folders = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
        let listed = super::super::listed();
        let mut found = 0;
        for entry in fs::read_dir(folders).expect("the sources").map(|entry| entry.expect("one")) {
            if !entry.path().join("plain.rs").exists() {
                continue;
            }
            let module = format!("::ops::{}::", entry.file_name().to_string_lossy());
            assert!(listed.iter().any(|path| path.contains(&module)), "{module} is not listed");
            found += 1;
        }
        assert!(found >= 6, "{found}");
    }

    /// GELU with one thing wrong.
    #[derive(Clone, Copy)]
    enum Broken {
        Output,
        Gradient,
        NaN,
        Rounding,
        Refusal,
    }

    impl Operation<1> for Broken {
        const NAME: &'static str = "broken_gelu";
        type Saved = Tensor;

        fn plain(&self, inputs: [&Tensor; 1]) -> Tensor {
            GeluTanh.plain(inputs)
        }

        fn kernels() -> &'static KernelFile {
            GeluTanh::kernels()
        }

        fn takes(&self, _pass: Pass, _inputs: [&Tensor; 1]) -> Result<(), Misfit> {
            if matches!(self, Broken::Refusal) { Err(Misfit::Shape) } else { Ok(()) }
        }

        fn forward(&self, pass: Pass, inputs: [Tensor; 1]) -> (Tensor, Self::Saved) {
            let (output, saved) = GeluTanh.forward(pass, inputs);
            let output = match self {
                Broken::Output => output * 1.1,
                Broken::NaN => output * f64::NAN,
                // A bit more than half of bfloat16's last one.
                Broken::Rounding => output * (1.0 + 1.0 / 256.0),
                Broken::Gradient | Broken::Refusal => output,
            };
            (output, saved)
        }

        fn backward(&self, pass: Pass, saved: Tensor, grad_output: Tensor) -> [Tensor; 1] {
            let [gradient] = GeluTanh.backward(pass, saved, grad_output);
            [if matches!(self, Broken::Gradient) { -gradient } else { gradient }]
        }

        fn least_bytes(&self, inputs: [&Tensor; 1]) -> Bytes {
            GeluTanh.least_bytes(inputs)
        }

        fn cases() -> Vec<Case<Self, 1>> {
            Vec::new()
        }
    }

    #[test]
    fn an_operation_that_is_wrong_is_named() {
        for (operation, words) in [
            (Broken::Output, "the output is off by "),
            (Broken::NaN, "the output is off by NaN"),
            (Broken::Gradient, "the gradient of input 0 is off by "),
            (Broken::Rounding, "rounds otherwise than libtorch's operators: "),
            (Broken::Refusal, "the single pass does not take it: Shape"),
        ] {
            let inputs = [drawn(&[3, 101], Kind::BFloat16, 1)];
            let case = Case { operation, inputs, tolerance: 2e-2 };
            let what = verify_cases(Pass::Cpu, Device::Cpu, &[case]).expect_err("it is wrong");
            assert!(what.starts_with("broken_gelu of [([3, 101], BFloat16)] on Cpu: "), "{what}");
            assert!(what.contains(words), "{what}");
        }
    }
}
