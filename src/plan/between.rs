//! Estimates the work between matrix products and attention: norms, modulations, rotations, gates,
//! sums and copies.

use tch::{Device, Kind};

use crate::config::RunConfig;
use crate::ops::Kernels;
use crate::parallel::DeviceChoice;
use crate::plan::ForwardWork;
use crate::plan::prediction::Passes;

/// Operators for each product, and bytes for each byte that products read and write.
struct Rates {
    operators: f64,
    bytes: f64,
}

impl Rates {
    const fn new(operators: f64, bytes: f64) -> Self {
        Rates { operators, bytes }
    }

    /// Rates of a forward and of its backward, without the copies of parameters' gradients.
    ///
    /// Source: counted by `fm-dist step --operators` for FLUX of 2 double and 4 single blocks, 4
    /// heads of 128, 1024 image tokens and 512 of text. Qwen-Image and FLUX.2 move 5.3 and 6.2
    /// forward, 10 and 13 backward, by libtorch's operators in bfloat16.
    const fn known(kernels: Kernels, is_wide: bool) -> [Self; 2] {
        match (kernels, is_wide) {
            (Kernels::Fused, true) => [Rates::new(3.7, 1.35), Rates::new(4.6, 2.15)],
            (Kernels::Fused, false) => [Rates::new(3.8, 1.45), Rates::new(4.6, 2.2)],
            (Kernels::Plain, true) => [Rates::new(5.8, 2.6), Rates::new(11.2, 6.4)],
            (Kernels::Plain, false) => [Rates::new(7.4, 5.4), Rates::new(11.7, 10.4)],
        }
    }
}

/// Returns what a run of this configuration computes operations by.
pub fn taken_kernels(config: &RunConfig) -> Kernels {
    let device = match config.parallel.device {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda => Device::Cuda(0),
    };
    config.compute.kernels.taken(device, config.parallel.num_threads)
}

/// Returns what a forward and its backward do between products, for a forward of this work in
/// `kind`.
pub fn between_products(work: &ForwardWork, kernels: Kernels, kind: Kind) -> [Passes; 2] {
    Rates::known(kernels, kind == Kind::Float).map(|Rates { operators, bytes }| Passes {
        operators: operators * work.products as f64,
        bytes: bytes * work.passed_bytes,
    })
}
