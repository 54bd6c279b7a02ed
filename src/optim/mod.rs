//! Optimizers over flat slices, averages of the weights, gradient clipping, learning-rate
//! schedules. Nothing here knows a rank.
//!
//! An optimizer is a folder: `mod.rs` has its settings and factors, `plain.rs` the update by
//! libtorch's operators, `cpu.rs` and `cuda.rs` with `kernel.cu` the single passes. A pass brings
//! only what it computes with an element: `runs` cuts a slice on a CPU for vectors and threads,
//! `launches` one on a GPU for its kernel, and `trial` compares a kernel with `plain.rs` when a run
//! starts.

pub mod adamw;
pub mod clip;
pub mod ema;
mod launches;
pub mod lr;
mod runs;
mod settings;
mod trial;

pub use adamw::AdamW;
pub use ema::EmaSettings;
pub use settings::{Decay, OptimizerSettings};

use tch::{Device, Tensor};

use crate::error::Result;
use crate::registry::registry;

/// A slice of flat parameters with what one update needs.
pub struct Slice<'a> {
    /// `[P]` f32, changed in place.
    pub params: &'a mut Tensor,
    /// `[P]` f32 or bf16.
    pub gradient: &'a Tensor,
    /// Factor by which the gradient is multiplied first: the clipping's coefficient, 1 for none.
    pub gradient_factor: f64,
    /// The optimizer's tensors in the order of [`Optimizer::state_names`], each `[P]` f32, changed
    /// in place.
    pub state: &'a mut [Tensor],
    /// `[P]` bf16, which becomes the parameters rounded; none where the f32 parameters are computed
    /// with.
    pub computed: Option<&'a mut Tensor>,
    /// The average that moves towards what the parameters become; none where it stays.
    pub average: Option<Average<'a>>,
    /// Runs `(offset, length)` of the slice that weight decay applies to.
    pub decayed: &'a [(i64, i64)],
    /// Factor of the weight decay.
    pub decay_factor: f64,
}

/// The average of a slice's parameters.
pub struct Average<'a> {
    /// `[P]` f32 or bf16, changed in place.
    pub values: &'a mut Tensor,
    /// Share of its distance to the parameters by which it moves: 1 − decay.
    pub share: f64,
}

/// An update rule. Its state lives with whoever owns the slices; the rule itself is settings only.
pub trait Optimizer {
    /// Peak learning rate, which the schedule scales.
    fn lr(&self) -> f64;

    /// Names of the state tensors, as a checkpoint spells them.
    fn state_names(&self) -> &'static [&'static str];

    /// The rule made ready for slices on `device`, once for a run.
    ///
    /// # Errors
    /// [`Error::Environment`](crate::error::Error::Environment) if the device lacks what the rule
    /// needs, or computes wrongly.
    fn on(&self, device: Device) -> Result<Box<dyn Update>>;
}

/// An update rule that is ready for one device.
pub trait Update {
    /// One update; `step` counts from 1.
    fn update(&self, slice: Slice<'_>, lr: f64, step: u64);
}

registry! {
    /// `[optimizer.<name>]`: one file, one line an optimizer.
    pub enum OptimizerChoice: Optimizer {
        "adamw" => AdamW(AdamW),
    }
}
