//! `[flow_matching]`: the reference's parameters under the reference's names and defaults, then
//! fm-dist's own.

mod sampling;

pub use sampling::SamplingSettings;

use super::timestep_sampling::{DistributionParameters, TimestepSampling};
use crate::settings::{above_up_to, choice, settings};

choice! {
    /// Weight of a sample's loss as a function of its sigma.
    pub enum LossWeightingScheme {
        /// `1 + flow_shift·sigma`.
        "linear" => Linear,
        /// A bell over the timesteps, as ai-toolkit has it.
        "bsmntw" => Bsmntw,
    }
}

choice! {
    /// Treatment of draws outside `[sigma_min, sigma_max]`.
    pub enum SigmaWindow {
        /// Moved to the nearest edge, the reference's way; many samples may pile up there.
        "clamp" => Clamp,
        /// Never drawn: the distribution is cut off and rescaled.
        "truncate" => Truncate,
    }
}

choice! {
    /// The part that drops conditions for classifier-free guidance.
    pub enum CfgDropout {
        /// The adapter, if it does at all, the reference's way.
        "adapter" => Adapter,
        /// The pipeline, each sample by itself, whatever the adapter.
        "per_sample" => PerSample,
    }
}

choice! {
    /// The value that takes a dropped condition's place.
    pub enum CfgDropoutValue {
        /// Zeros, the reference's way.
        "zeros" => Zeros,
        /// The empty prompt's, which guidance uses when images are generated: the batch's
        /// `empty.<key>`.
        "empty_prompt" => EmptyPrompt,
    }
}

choice! {
    /// The generator of noise and timesteps.
    pub enum DrawPlace {
        /// The CPU's: the same numbers on every device, drawn beside the step before.
        "host" => Host,
        /// That of the computing device: on a GPU the numbers that the reference draws there.
        "device" => Device,
    }
}

choice! {
    /// Samples that one draw of image-to-video decides for.
    pub enum TaskScope {
        /// A whole batch, the reference's way.
        "batch" => Batch,
        /// Each sample by itself.
        "sample" => Sample,
    }
}

settings! {
    /// `[flow_matching]`: timesteps, noise and loss.
    ///
    /// Defaults are the reference's; those of fm-dist's own settings leave its behaviour alone.
    pub struct FlowMatchingSettings {
        /// Scale of the timesteps that the model sees: t = sigma times this.
        pub num_train_timesteps: i64 = 1000, in 1..=1_000_000;
        /// Distribution of u, from which sigma follows.
        pub timestep_sampling: TimestepSampling = TimestepSampling::LogitNormal;
        /// Shift towards noise, sigma = s/(s + 1/u - 1); also the slope of the linear loss weight.
        pub flow_shift: f64 = 3.0, in above_up_to(0.0, 1000.0);
        /// Share of video batches trained as image-to-video.
        pub i2v_prob: f64 = 0.3, in 0.0..=1.0;
        /// Share of conditions dropped for classifier-free guidance.
        pub cfg_dropout_prob: f64 = 0.1, in 0.0..=1.0;
        /// Parameters of the distributions, in the same table.
        pub distribution: DistributionParameters, as flat;
        /// False draws sigma uniformly without a shift, whatever `timestep_sampling` says.
        pub use_sigma_noise: bool = true;
        /// Lower edge of the sigma window; equal to sigma_max it is every sample's sigma.
        pub sigma_min: f64 = 0.0, in 0.0..=1.0;
        /// Upper edge of the sigma window.
        pub sigma_max: f64 = 1.0, in 0.0..=1.0;
        /// Whether a sample's loss is weighted by its sigma.
        pub use_loss_weighting: bool = true;
        /// How it is weighted.
        pub loss_weighting_scheme: LossWeightingScheme = LossWeightingScheme::Linear;
        /// Steps between detailed log blocks; 0: none.
        pub log_interval: u64 = 100, in 0..;
        /// Steps between summary log lines; 0: none.
        pub summary_log_interval: u64 = 10, in 0..;
        /// What becomes of draws outside the sigma window: moved to its edge, or never drawn.
        pub sigma_window: SigmaWindow = SigmaWindow::Clamp;
        /// Whether the batch's `loss_mask` weighs the mean loss over the global batch; false
        /// carries it along unused, as the reference does.
        pub apply_loss_mask: bool = false;
        /// Who drops conditions: the adapter in its own way, or the pipeline, each sample by
        /// itself.
        pub cfg_dropout: CfgDropout = CfgDropout::Adapter;
        /// What a dropped condition becomes; the data must have an empty prompt.
        pub cfg_dropout_value: CfgDropoutValue = CfgDropoutValue::Zeros;
        /// Whether image-to-video is drawn for a whole batch or for each sample; with seed_scope =
        /// "sample" always for each.
        pub task_scope: TaskScope = TaskScope::Batch;
        /// Spread the global batch's draws of u evenly over the distribution, one in each slice.
        pub stratified_timesteps: bool = false;
        /// Whose generator draws noise and timesteps: the host's, with the same numbers on every
        /// device, or the computing device's, as the reference does; then a GPU's numbers depend on
        /// its model.
        pub draws: DrawPlace = DrawPlace::Host;
    }
}
