//! `[flow_matching]`: the reference's parameters under the reference's names and defaults, then
//! fm-dist's own.

use super::timestep_sampling::TimestepSampling;
use crate::settings::{Choice, Keys, Settings, above_up_to};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LossWeightingScheme {
    #[default]
    Linear,
    Bsmntw,
}

impl Choice for LossWeightingScheme {
    const ALL: &'static [(&'static str, Self)] =
        &[("linear", LossWeightingScheme::Linear), ("bsmntw", LossWeightingScheme::Bsmntw)];
}

/// What becomes of draws outside `[sigma_min, sigma_max]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SigmaWindow {
    /// Moved to the nearest edge, the reference's way; many samples may pile up there.
    #[default]
    Clamp,
    /// Never drawn: the distribution is cut off and rescaled.
    Truncate,
}

impl Choice for SigmaWindow {
    const ALL: &'static [(&'static str, Self)] =
        &[("clamp", SigmaWindow::Clamp), ("truncate", SigmaWindow::Truncate)];
}

/// Who drops conditions for classifier-free guidance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CfgDropout {
    /// The adapter, if it does at all, the reference's way.
    #[default]
    Adapter,
    /// The pipeline, each sample by itself, whatever the adapter.
    PerSample,
}

impl Choice for CfgDropout {
    const ALL: &'static [(&'static str, Self)] =
        &[("adapter", CfgDropout::Adapter), ("per_sample", CfgDropout::PerSample)];
}

/// What a dropped condition becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CfgDropoutValue {
    /// The reference's way.
    #[default]
    Zeros,
    /// The empty prompt's, which guidance uses when images are generated: the batch's
    /// `empty.<key>`.
    EmptyPrompt,
}

impl Choice for CfgDropoutValue {
    const ALL: &'static [(&'static str, Self)] =
        &[("zeros", CfgDropoutValue::Zeros), ("empty_prompt", CfgDropoutValue::EmptyPrompt)];
}

/// For whom image-to-video is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TaskScope {
    /// A whole batch, the reference's way.
    #[default]
    Batch,
    Sample,
}

impl Choice for TaskScope {
    const ALL: &'static [(&'static str, Self)] =
        &[("batch", TaskScope::Batch), ("sample", TaskScope::Sample)];
}

#[derive(Clone, Debug, PartialEq)]
pub struct FlowMatchingSettings {
    pub num_train_timesteps: i64,
    pub timestep_sampling: TimestepSampling,
    pub flow_shift: f64,
    pub i2v_prob: f64,
    pub cfg_dropout_prob: f64,
    pub logit_mean: f64,
    pub logit_std: f64,
    pub mix_uniform_ratio: f64,
    pub beta_alpha: f64,
    pub beta_beta: f64,
    pub use_sigma_noise: bool,
    pub sigma_min: f64,
    pub sigma_max: f64,
    pub use_loss_weighting: bool,
    pub loss_weighting_scheme: LossWeightingScheme,
    pub log_interval: u64,
    pub summary_log_interval: u64,
    pub sigma_window: SigmaWindow,
    pub apply_loss_mask: bool,
    pub cfg_dropout: CfgDropout,
    pub cfg_dropout_value: CfgDropoutValue,
    pub task_scope: TaskScope,
    pub stratified_timesteps: bool,
}

impl Default for FlowMatchingSettings {
    fn default() -> Self {
        FlowMatchingSettings {
            num_train_timesteps: 1000,
            timestep_sampling: TimestepSampling::default(),
            flow_shift: 3.0,
            i2v_prob: 0.3,
            cfg_dropout_prob: 0.1,
            logit_mean: 0.0,
            logit_std: 1.0,
            mix_uniform_ratio: 0.1,
            beta_alpha: 2.5,
            beta_beta: 1.5,
            use_sigma_noise: true,
            sigma_min: 0.0,
            sigma_max: 1.0,
            use_loss_weighting: true,
            loss_weighting_scheme: LossWeightingScheme::default(),
            log_interval: 100,
            summary_log_interval: 10,
            sigma_window: SigmaWindow::default(),
            apply_loss_mask: false,
            cfg_dropout: CfgDropout::default(),
            cfg_dropout_value: CfgDropoutValue::default(),
            task_scope: TaskScope::default(),
            stratified_timesteps: false,
        }
    }
}

impl Settings for FlowMatchingSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        let positive = above_up_to(0.0, 1000.0);
        keys.integer(
            "num_train_timesteps",
            &mut self.num_train_timesteps,
            1..=1_000_000,
            "Scale of the timesteps that the model sees: t = sigma times this.",
        );
        keys.choice(
            "timestep_sampling",
            &mut self.timestep_sampling,
            "Distribution of u, from which sigma follows.",
        );
        keys.number(
            "flow_shift",
            &mut self.flow_shift,
            positive,
            "Shift towards noise, sigma = s/(s + 1/u - 1); also the slope of the linear loss weight.",
        );
        keys.number(
            "i2v_prob",
            &mut self.i2v_prob,
            0.0..=1.0,
            "Share of video batches trained as image-to-video.",
        );
        keys.number(
            "cfg_dropout_prob",
            &mut self.cfg_dropout_prob,
            0.0..=1.0,
            "Share of conditions dropped for classifier-free guidance.",
        );
        keys.number(
            "logit_mean",
            &mut self.logit_mean,
            -10.0..=10.0,
            "Mean of the normal under `logit_normal`.",
        );
        keys.number(
            "logit_std",
            &mut self.logit_std,
            0.0..=1000.0,
            "Standard deviation of the normal under `logit_normal`.",
        );
        keys.number(
            "mix_uniform_ratio",
            &mut self.mix_uniform_ratio,
            0.0..=1.0,
            "Share of batches that draw u uniformly instead, in every mode but `beta`.",
        );
        keys.number("beta_alpha", &mut self.beta_alpha, positive, "First parameter of `beta`.");
        keys.number("beta_beta", &mut self.beta_beta, positive, "Second parameter of `beta`.");
        keys.flag(
            "use_sigma_noise",
            &mut self.use_sigma_noise,
            "False draws sigma uniformly without a shift, whatever `timestep_sampling` says.",
        );
        keys.number(
            "sigma_min",
            &mut self.sigma_min,
            0.0..=1.0,
            "Lower edge of the sigma window; equal to sigma_max it is every sample's sigma.",
        );
        keys.number("sigma_max", &mut self.sigma_max, 0.0..=1.0, "Upper edge of the sigma window.");
        keys.flag(
            "use_loss_weighting",
            &mut self.use_loss_weighting,
            "Whether a sample's loss is weighted by its sigma.",
        );
        keys.choice(
            "loss_weighting_scheme",
            &mut self.loss_weighting_scheme,
            "How it is weighted.",
        );
        keys.integer(
            "log_interval",
            &mut self.log_interval,
            0..,
            "Steps between detailed log blocks; 0: none.",
        );
        keys.integer(
            "summary_log_interval",
            &mut self.summary_log_interval,
            0..,
            "Steps between summary log lines; 0: none.",
        );
        keys.choice(
            "sigma_window",
            &mut self.sigma_window,
            "What becomes of draws outside the sigma window: moved to its edge, or never drawn.",
        );
        keys.flag(
            "apply_loss_mask",
            &mut self.apply_loss_mask,
            "Whether the batch's `loss_mask` weighs the mean loss over the global batch; false carries it along unused, as the reference does.",
        );
        keys.choice(
            "cfg_dropout",
            &mut self.cfg_dropout,
            "Who drops conditions: the adapter in its own way, or the pipeline, each sample by itself.",
        );
        keys.choice(
            "cfg_dropout_value",
            &mut self.cfg_dropout_value,
            "What a dropped condition becomes; the data must have an empty prompt.",
        );
        keys.choice(
            "task_scope",
            &mut self.task_scope,
            "Whether image-to-video is drawn for a whole batch or for each sample; with seed_scope = \"sample\" always for each.",
        );
        keys.flag(
            "stratified_timesteps",
            &mut self.stratified_timesteps,
            "Spread the global batch's draws of u evenly over the distribution, one in each slice.",
        );
    }
}
