//! Parts of models, on one device and without state: parameters are passed in as views.

mod activations;
pub mod attention;
pub mod convolution;
pub mod embed;
pub mod joint_block;
mod linear;
mod mlp;
pub mod modulation;
pub mod norm;
mod packed;
mod params;
pub mod patches;
mod per_shape;
pub mod rope;
mod rows;
mod settings;
mod tuned;

pub use activations::Activations;
pub use linear::Linear;
pub use mlp::{Mlp, Nonlinearity};
pub use packed::{FrozenDtype, Packed};
pub use params::{Builder, Class, Group, Init, Param, ParamInfo, ParamSet, Views};
pub use per_shape::PerShape;
pub use rows::{AttentionInfo, Rows, Tokens};
pub use settings::{AttentionKernels, ComputeSettings};
pub use tuned::{DROPOUT_KEYS, LowRank, LowRankChange, Tuned};

/// One cut of a model: a pure function from its parameters and the activations before it to those
/// after it.
///
/// A stage holds no tensor of its own, so that a model of any size can be described, counted and
/// laid out without memory.
pub trait Stage: Send {
    /// Names, shapes and initialization of the parameters, in their order in the flat buffer.
    fn params(&self) -> &ParamSet;

    /// Activations after this stage. Constants of `input` stay visible to later stages without
    /// being returned.
    fn forward(&self, params: &Views, input: &Activations) -> Activations;
}
