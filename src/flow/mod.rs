//! Flow matching: timesteps, noise, target, weights, loss, logs and the trajectory from noise to
//! data.
//!
//! sigma = 0 is data and sigma = 1 is noise; x = (1 − sigma)·latents + sigma·noise; the model
//! predicts noise − latents. Semantics follow the reference, NVIDIA NeMo AutoModel 0.5.0;
//! improvements have settings of their own in [`FlowMatchingSettings`]. This code is independent of
//! ranks, models and the transport of gradients.

pub mod adapter;
mod batch_keys;
mod draw;
mod image_tokens;
mod levels;
mod loss;
mod pipeline;
pub mod report;
mod schedule;
mod settings;
mod statistics;
pub mod time_shift;
pub mod timestep_sampling;
mod timesteps;
mod trajectory;

pub use adapter::{DropoutScope, FlowMatchingContext, ModelAdapter, TaskType};
pub use batch_keys::{
    BatchKey, DataShapes, Note, Role, Shapes, check_keys, dropped_keys, with_sample_axis,
};
pub use draw::{DrawRules, Drawn, DrawnNoise};
pub use image_tokens::ImageTokens;
pub use levels::Levels;
pub use loss::{
    EXPLODED, Kept, LOSS_MASK, LossValues, axes_of_mask, bsmntw_table, check_loss, is_sound,
};
pub use pipeline::{FlowMatchingPipeline, StepOptions, StepOutput, latents_of};
pub use schedule::LinearInterpolationSchedule;
pub use settings::{
    CfgDropout, CfgDropoutValue, DrawPlace, FlowMatchingSettings, HuberSchedule, LossType,
    LossWeightingScheme, SamplingSettings, SigmaWindow, TaskScope,
};
pub use statistics::{Moments, SIGMA_BINS, Statistics};
pub use timestep_sampling::TimestepSampling;
pub use timesteps::{SampledTimesteps, Strata, sample_timesteps};
pub use trajectory::{Guidance, Guide, NoiseLevel, NoiseLevels, Shift, Solver};
