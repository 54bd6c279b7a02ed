//! Operations that a CPU does in one pass over memory, with gradients [by hand](crate::autograd).
//!
//! libtorch does the same by a chain of operators, each of which reads and writes everything once,
//! forward and backward. Here that chain stays for what `fits` does not take: other devices, other
//! kinds, and more than one thread, among which libtorch's operators divide their work.

/// Compiles a function for several instruction sets, of which the first call chooses; rounding to
/// bfloat16 gains most by AVX-512.
macro_rules! vectorized {
    ($function:item) => {
        #[multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma",
            "x86_64+avx2+fma",
            "aarch64+neon"
        ))]
        $function
    };
}

mod exp;
mod gelu;
mod modulation;
pub(super) mod patches;
mod rms_norm;
mod rotation;
mod vectors;

pub use gelu::gelu_tanh;
pub use modulation::{affine_norm, gated};
pub use rms_norm::rms_norm;
pub use rotation::rotate;

use tch::{Device, Kind, Tensor};

/// Whether a loop of this process computes faster with such tensors than libtorch's operators.
fn fits(x: &Tensor) -> bool {
    let has_loops = x.device() == Device::Cpu
        && matches!(x.kind(), Kind::Float | Kind::BFloat16)
        && x.numel() > 0;
    has_loops && tch::get_num_threads() == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    /// Numbers drawn for a test.
    pub fn draw(shape: &[i64], kind: Kind, scope: u64) -> Tensor {
        let draw = || Tensor::randn(shape, (Kind::Float, Device::Cpu));
        Key::new(11, Purpose::Test).scope(scope).seeded(draw).to_kind(kind)
    }

    /// The output of an operation and the gradients of its inputs for a drawn gradient of the
    /// output, in f64.
    pub fn differentiated(
        inputs: &[Tensor],
        operation: impl Fn(&[Tensor]) -> Tensor,
    ) -> Vec<Tensor> {
        let inputs: Vec<Tensor> =
            inputs.iter().map(|input| input.detach().set_requires_grad(true)).collect();
        let output = operation(&inputs);
        let grad_output = draw(&output.size(), output.kind(), 99);
        let gradients = Tensor::run_backward(
            &[&output * &grad_output],
            &inputs.iter().collect::<Vec<_>>(),
            false,
            false,
        );
        [output.detach()]
            .into_iter()
            .chain(gradients)
            .map(|tensor| tensor.to_kind(Kind::Double))
            .collect()
    }

    /// `by_hand` gives the numbers and gradients of `plain` in f64, up to `tolerance` of the
    /// largest, in the kind of `inputs`.
    pub fn agree(
        inputs: &[Tensor],
        tolerance: f64,
        by_hand: impl Fn(&[Tensor]) -> Tensor,
        plain: impl Fn(&[Tensor]) -> Tensor,
    ) {
        tch::set_num_threads(1);
        assert!(fits(&inputs[0]));
        let exact: Vec<Tensor> = inputs.iter().map(|input| input.to_kind(Kind::Double)).collect();
        let found = differentiated(inputs, by_hand);
        for (place, (found, expected)) in
            found.iter().zip(differentiated(&exact, plain)).enumerate()
        {
            let scale = expected.abs().max().double_value(&[]);
            let error = (found - expected).abs().max().double_value(&[]) / scale;
            assert!(
                error <= tolerance,
                "output, then gradients, number {place}: off by {error:e} of the largest"
            );
        }
    }
}
