//! Data mixed with noise.

mod cuda;
mod plain;

use tch::{Kind, Tensor};

use super::launch::KernelFile;
use super::{Bytes, Case, Misfit, Operation, Pass, bytes, drawn};

/// `(1 − sigma) · data + sigma · noise`, computed in f32, each product rounded before the sum.
///
/// # Shapes
/// `data`: `[B, …]`; `noise`: the same, f32; `sigma`: `[B]` f32. All of them are constants. Returns
/// the shape and kind of `data`.
///
/// Source: Lipman et al. 2023, arXiv:2210.02747, eq. 20–23, time reversed.
#[derive(Clone, Copy, Debug)]
pub struct Noising;

impl Operation<3> for Noising {
    const NAME: &'static str = "noising";
    const CONSTANTS: [bool; 3] = [true; 3];
    type Saved = ();

    fn plain(&self, [data, noise, sigma]: [&Tensor; 3]) -> Tensor {
        plain::noising(data, noise, sigma)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, _pass: Pass, [data, noise, sigma]: [&Tensor; 3]) -> Result<(), Misfit> {
        if [noise, sigma].iter().any(|tensor| tensor.kind() != Kind::Float) {
            Err(Misfit::Kind)
        } else if noise.size() != data.size() || data.size().first() != sigma.size().first() {
            Err(Misfit::Shape)
        } else {
            Ok(())
        }
    }

    fn forward(&self, pass: Pass, [data, noise, sigma]: [Tensor; 3]) -> (Tensor, ()) {
        let output = match pass {
            Pass::Cpu => plain::noising(&data, &noise, &sigma),
            Pass::Cuda => cuda::noising(&data, &noise, &sigma),
        };
        (output, ())
    }

    fn backward(&self, _pass: Pass, (): (), _grad_output: Tensor) -> [Tensor; 3] {
        std::array::from_fn(|_| Tensor::new())
    }

    fn least_bytes(&self, [data, noise, sigma]: [&Tensor; 3]) -> Bytes {
        Bytes { forward: bytes([data, noise, sigma, data]), backward: 0 }
    }

    fn cases() -> Vec<Case<Self, 3>> {
        let case = |kind, tolerance, shape: &[i64]| {
            let sigma = drawn(&shape[..1], Kind::Float, 3).sigmoid();
            let inputs = [drawn(shape, kind, 1), drawn(shape, Kind::Float, 2), sigma];
            Case { operation: Noising, inputs, tolerance }
        };
        [(Kind::Float, 3e-7), (Kind::BFloat16, 4e-3)]
            .into_iter()
            .flat_map(|(kind, tolerance)| {
                [case(kind, tolerance, &[3, 101]), case(kind, tolerance, &[2, 4, 6, 8])]
            })
            .collect()
    }
}
