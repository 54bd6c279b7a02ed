//! The update on a GPU: one kernel, one pass over memory, compiled when a run starts and compared
//! with the plain operators.

use tch::{Device, Kind};

use super::{AdamW, Factors, plain};
use crate::cuda::{Elementwise, Outcome, Source, Text};
use crate::error::{Error, Result};
use crate::optim::launches::launch;
use crate::optim::trial::{Trial, wave};
use crate::optim::{Optimizer, Slice, Update};

static KERNEL: Source = Source {
    text: Text { file: "adamw/kernel.cu", pieces: &[include_str!("kernel.cu")] },
    name: "adamw",
    kinds: &[
        Kind::Float,
        Kind::Float,
        Kind::BFloat16,
        Kind::Float,
        Kind::Float,
        Kind::BFloat16,
        Kind::Float,
        Kind::BFloat16,
    ],
};

/// AdamW as a kernel of one GPU.
///
/// The bits are those of the single pass on a CPU.
pub struct OnGpu {
    adamw: AdamW,
    kernel: Elementwise,
}

impl OnGpu {
    /// Compiles the kernel for `device` and checks that it computes what the plain operators do.
    /// `Device::Cpu` in place of a GPU is for a stand-in of the driver that works on the host's
    /// memory.
    ///
    /// # Errors
    /// [`Error::Environment`] if there is no compiler, if it or the driver refuses, and for other
    /// numbers; [`Error::Device`] and [`Error::OutOfMemory`] if the GPU fails meanwhile. The plain
    /// operators are no silent substitute: they round differently, so that ranks would part, and a
    /// GPU or a compiler that computes wrongly is not to be trusted with a run.
    pub fn ready(adamw: &AdamW, device: Device) -> Result<Self> {
        let refused = |what| {
            let text = format!("AdamW's kernel on {device:?}: {what}");
            Error::from_library_or(text, Error::environment)
        };
        let update = OnGpu {
            adamw: adamw.clone(),
            kernel: Elementwise::build(&KERNEL, device).map_err(refused)?,
        };
        update.check(device).map_err(refused)?;
        tracing::info!("AdamW's kernel on {device:?} computes what libtorch's operators compute");
        Ok(update)
    }

    /// Compares one update with the plain operators', for each kind of gradient and average.
    fn check(&self, device: Device) -> Outcome<()> {
        // A mean of both signs and a mean of squares.
        let trial = |kind| {
            let state = vec![wave(0.7, device) * 0.1, wave(2.9, device).square() * 0.1];
            Trial::new(state, kind, device)
        };
        for kind in [Kind::Float, Kind::BFloat16] {
            let (mut found, mut expected) = (trial(kind), trial(kind));
            let factors = self.adamw.factors(&found.slice(), 0.01, 3);
            self.launch(found.slice(), factors)?;
            plain::update(expected.slice(), factors);
            found.compare(&expected, self.adamw.state_names())?;
        }
        Ok(())
    }

    fn launch(&self, slice: Slice<'_>, factors: Factors) -> Outcome<()> {
        let Factors { gradient, decay, beta1, beta2, root_correction, eps, move_by, average_share } =
            factors;
        let root_correction = root_correction as f32;
        let [gradient, decay, fresh1, beta2, fresh2, eps, move_by, average_share] =
            [gradient, decay, 1.0 - beta1, beta2, 1.0 - beta2, eps, move_by, average_share]
                .map(|number| number as f32);
        // The kernel's `Rule`.
        let correction = 1.0 / root_correction;
        let rule =
            [gradient, decay, fresh1, beta2, fresh2, correction, eps, move_by, average_share];
        launch(&self.kernel, slice, &rule)
    }
}

impl Update for OnGpu {
    /// # Panics
    /// If the driver refuses, as libtorch's own operators do: mostly for something that was queued
    /// earlier.
    fn update(&self, slice: Slice<'_>, lr: f64, step: u64) {
        let factors = self.adamw.factors(&slice, lr, step);
        self.launch(slice, factors).unwrap_or_else(|what| panic!("AdamW's kernel: {what}"));
    }
}
