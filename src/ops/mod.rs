//! Operations that a device does in one pass over memory, with gradients of their own.
//!
//! libtorch does the same by a chain of operators, each of which reads and writes everything once,
//! forward and backward. Models and their parts call [`apply`] and know nothing of devices;
//! [`apply`] is the only place that chooses, and the only one with a fallback.
//!
//! # One folder an operation
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | meaning, shapes, source; the implementation of [`Operation`] |
//! | `plain.rs` | the operation by libtorch's operators, on any device: what every pass must give |
//! | `cpu.rs` | the single pass over a CPU's memory, by `lanes`, with its gradient; none for operations on latents, which are few beside the model's numbers: there a CPU takes `plain.rs` |
//! | `cuda.rs`, `kernel.cu` | the pass over a GPU's memory, by `launch`; its bits are those of `cpu.rs` wherever sums have one order |
//!
//! # To add an operation
//! 1. Make its folder and declare it below. Its type is `Copy`; settings (epsilon, [`Rounding`])
//!    are its fields.
//! 2. Add one line to the list in `operations!`, and its name behind it if it is [`PassingOn`].
//! 3. Let [`Operation::cases`] reach every branch: both kinds, each setting, a few shapes.
//!
//! [`verify`] then compares it with `plain.rs`, forward and backward: in the tests, and when a
//! program begins to compute on a GPU, which leaves out what differs.
//!
//! # Inputs that others use, too
//! The gradients of a tensor's uses meet in a sum, for which libtorch reads each of them and writes
//! what it has so far. [`apply_passing_on`] and [`product_passing_on`] hand their input on, so
//! that uses stand in a row: each adds its gradient to that of the ones behind it, where it writes
//! its own anyway.
//!
//! # Gradients of weights
//! They are as large as the weights. A product computes one in the place that was
//! [offered](crate::libtorch::offer_place) for it, a part of its stage's flat gradient, from which
//! nothing has to copy it.

pub mod autograd;
mod beside;
mod choice;
mod dense_gradient;
mod gated_residual;
mod gelu_tanh;
mod lanes;
mod launch;
mod modulated_norm;
mod modulation;
mod noising;
mod patches;
mod product;
mod ranges;
mod rms_norm;
mod rotated_norm;
mod rotation;
mod rounding;
mod silu_gate;
mod squared_error;
mod verify;

pub use beside::Beside;
use beside::OfFeatures;
pub use choice::{Kernels, choose, fallbacks, leave_out, way};
pub use dense_gradient::with_dense_gradient;
pub use patches::{FeatureOrder, Patch, grid};
pub use product::{computes_in_place, product_onto, product_passing_on};
pub use rounding::{Rounding, at_least_float};
pub use verify::{
    Case, Unfit, Verified, differentiated_by, differentiated_passing_on_by, drawn, verify,
    verify_by, verify_cases,
};

use tch::{Device, Kind, Tensor};

use crate::cuda::Text;
use crate::libtorch::{as_one, is_counting};

use autograd::{custom_gradient, passing_on};

/// Lists the operations, one a line, for [`verify`] and for the rooms above; behind them those that
/// pass an input on.
macro_rules! operations {
    ($($folder:ident::$operation:ident,)+; passing on: $($passing:ident,)+) => {
        $(pub use $folder::$operation;)+

        /// Verifies every operation by `pass` on `device`.
        fn verify_each(pass: Pass, device: Device) -> Verified {
            let mut verified = Verified::default();
            $(verified.add($operation::NAME, verify::verify_one::<$operation, _>(pass, device));)+
            $(verified.add($passing::NAME, verify::verify_passing_on::<$passing, _>(pass, device));)+
            verified
        }

        /// Returns the texts of all kernels, each once.
        pub fn kernel_texts() -> Vec<Text> {
            let mut texts = vec![launch::COLUMN_SUMS.text()];
            $(texts.push($operation::kernels().text());)+
            texts.sort_by_key(|text| text.file);
            texts.dedup_by_key(|text| text.file);
            texts
        }

        /// Paths of the operations' types.
        #[cfg(test)]
        fn listed() -> Vec<&'static str> {
            vec![$(std::any::type_name::<$operation>()),+]
        }
    };
}

operations! {
    beside::GeluTanhBeside,
    beside::SiluGateBeside,
    gated_residual::GatedResidual,
    gelu_tanh::GeluTanh,
    modulated_norm::ModulatedNorm,
    noising::Noising,
    patches::Cut,
    patches::Join,
    ranges::Ranges,
    rms_norm::RmsNorm,
    rotated_norm::RotatedNorm,
    rotation::Rotation,
    silu_gate::SiluGate,
    squared_error::SquaredError,
    ;
    passing on:
    ModulatedNorm,
}

/// A device that has single passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Loops over vectors, on the thread that calls.
    Cpu,
    /// Kernels of our own.
    Cuda,
}

impl Pass {
    /// The passes of `device`, if there are any.
    fn on(device: Device) -> Option<Self> {
        match device {
            Device::Cpu => Some(Pass::Cpu),
            Device::Cuda(_) => Some(Pass::Cuda),
            _ => None,
        }
    }

    /// Checks that the pass can count the numbers of all inputs.
    fn counts<const N: usize>(self, inputs: [&Tensor; N]) -> Result<(), Misfit> {
        match self {
            Pass::Cpu => Ok(()),
            Pass::Cuda => inputs.into_iter().try_for_each(launch::is_counted),
        }
    }
}

/// Reason for which a single pass does not take its inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Misfit {
    Kind,
    Shape,
    Empty,
    Devices,
}

/// Bytes that an operation reads and writes if each number moves once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    pub forward: u64,
    pub backward: u64,
}

/// Bytes of tensors.
fn bytes<const N: usize>(tensors: [&Tensor; N]) -> u64 {
    tensors.iter().map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
}

/// An operation on `N` tensors: its meaning, and the devices that do it in one pass.
pub trait Operation<const N: usize>: Copy + Send + 'static {
    /// Name in messages.
    const NAME: &'static str;

    /// True for each input that is a constant and gets no gradient.
    const CONSTANTS: [bool; N] = [false; N];

    /// Values that the gradient needs. They are the same for all passes: detached tensors.
    type Saved: Send + 'static;

    /// Computes the operation by libtorch's operators, on any device and for any floating kind,
    /// differentiably. In f64 it is the truth that passes are compared with.
    fn plain(&self, inputs: [&Tensor; N]) -> Tensor;

    /// The kernels of its pass on a GPU.
    fn kernels() -> &'static launch::KernelFile;

    /// Checks that `pass` knows these kinds and shapes. All inputs are on its device, and the first
    /// is not empty and of float32 or bfloat16.
    ///
    /// # Errors
    /// The first reason for which it does not.
    fn takes(&self, pass: Pass, inputs: [&Tensor; N]) -> Result<(), Misfit>;

    /// Returns input number `number` in a layout that `pass` reads; by default without gaps.
    fn laid_out(_pass: Pass, _number: usize, input: Tensor) -> Tensor {
        input.contiguous()
    }

    /// Computes the output, and what [`backward`](Self::backward) needs besides its gradient.
    /// `inputs` are detached and laid out, and were taken.
    fn forward(&self, pass: Pass, inputs: [Tensor; N]) -> (Tensor, Self::Saved);

    /// Computes the gradient of each input, of its shape and kind; [`Tensor::new`] for a constant.
    /// `grad_output` is contiguous.
    fn backward(&self, pass: Pass, saved: Self::Saved, grad_output: Tensor) -> [Tensor; N];

    /// Fewest bytes that a pass can move for these inputs.
    fn least_bytes(&self, inputs: [&Tensor; N]) -> Bytes;

    /// Drawn inputs for [`verify`].
    fn cases() -> Vec<Case<Self, N>>;
}

/// An operation that can pass its first input on to other uses, whose gradient its own is added to
/// where it is computed: libtorch would read both and write the sum.
pub trait PassingOn<const N: usize>: Operation<N> {
    /// As [`backward`](Operation::backward), with what was `passed`, the gradient of the first
    /// input's other uses, in the first gradient; it is contiguous.
    fn backward_onto(
        &self,
        pass: Pass,
        saved: Self::Saved,
        grad_output: Tensor,
        passed: Option<&Tensor>,
    ) -> [Tensor; N];
}

/// Computes `operation` in a single pass where one exists for the inputs' device, takes them, and
/// [`choose`] allows it; by libtorch's operators otherwise, which is counted.
pub fn apply<O: Operation<N>, const N: usize>(operation: O, inputs: [&Tensor; N]) -> Tensor {
    match pass_for(operation, inputs) {
        Some(pass) => single_pass(operation, pass, inputs),
        None => operation.plain(inputs),
    }
}

/// As [`apply`]; returns the first input for its other uses, and the output.
pub fn apply_passing_on<O: PassingOn<N>, const N: usize>(
    operation: O,
    inputs: [&Tensor; N],
) -> (Tensor, Tensor) {
    match pass_for(operation, inputs) {
        Some(pass) => single_pass_passing_on(operation, pass, inputs),
        None => (inputs[0].shallow_clone(), operation.plain(inputs)),
    }
}

/// The single pass that computes an operation of these inputs.
fn pass_for<O: Operation<N>, const N: usize>(operation: O, inputs: [&Tensor; N]) -> Option<Pass> {
    let pass = choice::pass_of(O::NAME, inputs[0].device())?;
    let misfit = fits(operation, pass, inputs).err();
    choice::count(O::NAME, misfit);
    misfit.is_none().then_some(pass)
}

/// Checks that a pass takes these inputs: what holds for every operation, and the operation's own.
fn fits<O: Operation<N>, const N: usize>(
    operation: O,
    pass: Pass,
    inputs: [&Tensor; N],
) -> Result<(), Misfit> {
    let first = inputs[0];
    if inputs.iter().any(|input| input.device() != first.device()) {
        Err(Misfit::Devices)
    } else if !matches!(first.kind(), Kind::Float | Kind::BFloat16) {
        Err(Misfit::Kind)
    } else if first.numel() == 0 {
        Err(Misfit::Empty)
    } else {
        pass.counts(inputs)?;
        operation.takes(pass, inputs)
    }
}

fn single_pass<O: Operation<N>, const N: usize>(
    operation: O,
    pass: Pass,
    inputs: [&Tensor; N],
) -> Tensor {
    let of_backward = bytes_of_backward(operation, inputs);
    custom_gradient(
        &inputs,
        || forward(operation, pass, inputs),
        move |saved, grad_output| {
            let grad_output = grad_output.contiguous();
            as_one(O::NAME, || of_backward, || operation.backward(pass, saved, grad_output)).into()
        },
    )
}

fn single_pass_passing_on<O: PassingOn<N>, const N: usize>(
    operation: O,
    pass: Pass,
    inputs: [&Tensor; N],
) -> (Tensor, Tensor) {
    let of_backward = bytes_of_backward(operation, inputs);
    passing_on(
        &inputs,
        || forward(operation, pass, inputs),
        move |saved, grad_output, passed| {
            let grad_output = grad_output.contiguous();
            let passed = passed.map(|passed| passed.contiguous());
            let passed = passed.as_ref();
            let moved = || of_backward + passed.map_or(0, |passed| bytes([passed]));
            let backward = || operation.backward_onto(pass, saved, grad_output, passed);
            as_one(O::NAME, moved, backward).into()
        },
    )
}

/// The output of a single pass, and what its gradient needs.
fn forward<O: Operation<N>, const N: usize>(
    operation: O,
    pass: Pass,
    inputs: [&Tensor; N],
) -> (Tensor, O::Saved) {
    let laid_out = |number: usize| O::laid_out(pass, number, inputs[number].detach());
    let laid_out = std::array::from_fn(laid_out);
    let moved = || operation.least_bytes(inputs).forward;
    as_one(O::NAME, moved, || operation.forward(pass, laid_out))
}

/// The bytes that a gradient moves, if operators are counted.
fn bytes_of_backward<O: Operation<N>, const N: usize>(operation: O, inputs: [&Tensor; N]) -> u64 {
    if is_counting() { operation.least_bytes(inputs).backward } else { 0 }
}
