//! `[flow_matching]`: the reference's parameters under the reference's names and defaults, then
//! fm-dist's own.

mod sampling;

pub use sampling::SamplingSettings;

use super::time_shift::{ShiftType, TimeShift};
use super::timestep_sampling::{DistributionParameters, TimestepSampling};
use crate::settings::{Choice, above_up_to, choice, settings};

choice! {
    /// Weight of a sample's loss as a function of its sigma.
    pub enum LossWeightingScheme {
        /// `1 + flow_shift·sigma`.
        "linear" => Linear,
        /// A bell over the timesteps, as ai-toolkit has it.
        "bsmntw" => Bsmntw,
        /// `sigma⁻²`, which grows without bound towards the data.
        "sigma_sqrt" => SigmaSqrt,
        /// `2/(π·(1 − 2·sigma + 2·sigma²))`, highest in the middle.
        "cosmap" => Cosmap,
    }
}

choice! {
    /// Loss of one element as a function of its error.
    pub enum LossType {
        /// The squared error, the reference's.
        "mse" => Mse,
        /// Half the squared error up to `huber_c`, a straight line beyond.
        "huber" => Huber,
        /// `sqrt(error² + huber_c²) − huber_c`.
        "pseudo_huber" => PseudoHuber,
    }
}

choice! {
    /// The error at which a Huber loss turns, by sigma.
    pub enum HuberSchedule {
        /// `huber_c`.
        "constant" => Constant,
        /// From 1 at the data to `huber_c` at noise, as `huber_c` to the power of sigma.
        "exponential" => Exponential,
        /// From 1 at the data to `huber_c` at noise, as `(1 − sigma)²`.
        "snr" => Snr,
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

/// Smallest `sigma_min` with which weights of `1/sigma²` are no matter for a warning.
const LEAST_BOUND: f64 = 0.01;
/// Smallest sigma that is drawn, apart from shifts towards the data.
const LEAST_SIGMA: f64 = 1e-5;

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
        /// Rule by which the shift follows from a sample's number of image tokens; constant is
        /// flow_shift for all.
        pub shift_type: ShiftType = ShiftType::Constant;
        /// Logarithm of the shift at few tokens: none under "linear", 256 under "flux".
        pub base_shift: f64 = 0.5, in -10.0..=10.0;
        /// Logarithm of the shift at 4096 tokens, under "linear" and "flux".
        pub max_shift: f64 = 1.15, in -10.0..=10.0;
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
        /// Loss of an element's error.
        pub loss_type: LossType = LossType::Mse;
        /// Error at which a Huber loss turns from its square to its absolute value.
        pub huber_c: f64 = 0.1, in above_up_to(0.0, 1000.0);
        /// How that error follows from sigma.
        pub huber_schedule: HuberSchedule = HuberSchedule::Constant;
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

impl FlowMatchingSettings {
    /// Returns the shift of samples of so many image tokens.
    pub fn shift(&self, image_tokens: i64) -> f64 {
        let FlowMatchingSettings { shift_type, base_shift, max_shift, .. } = *self;
        let rule = TimeShift { shift_type, base_shift, max_shift, constant: self.flow_shift };
        rule.shift(image_tokens)
    }

    /// True if sigma is drawn with a shift towards noise.
    pub fn shifts(&self) -> bool {
        self.use_sigma_noise && self.timestep_sampling.is_shifted
    }
    /// Returns what is worth a warning: settings without effect, and weights without bound.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.shift_type != ShiftType::Constant && !self.shifts() {
            let word = self.shift_type.word();
            warnings.push(format!(
                "shift_type = \"{word}\" has no effect: sigma is drawn without a shift"
            ));
        }
        if self.huber_schedule != HuberSchedule::Constant && self.loss_type == LossType::Mse {
            let word = self.huber_schedule.word();
            warnings
                .push(format!("huber_schedule = \"{word}\" has no effect: loss_type is \"mse\""));
        }
        let is_unbounded = self.loss_weighting_scheme == LossWeightingScheme::SigmaSqrt;
        if self.use_loss_weighting && is_unbounded && self.sigma_min < LEAST_BOUND {
            warnings.push(format!(
                "loss_weighting_scheme = \"sigma_sqrt\" weights a loss by 1/sigma², up to {:.0e} \
                 with sigma_min = {}; a step of such a sample counts as exploded. Set sigma_min",
                self.sigma_min.max(LEAST_SIGMA).powi(-2),
                self.sigma_min
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_without_effect_and_weights_without_bound_are_warned_of() {
        let warned = |change: fn(&mut FlowMatchingSettings)| {
            let mut settings = FlowMatchingSettings::default();
            change(&mut settings);
            settings.warnings().join("; ")
        };
        assert_eq!(warned(|_| ()), "");
        let beta = warned(|settings| {
            (settings.shift_type, settings.timestep_sampling) =
                (ShiftType::Flux, TimestepSampling::Beta);
        });
        assert_eq!(beta, "shift_type = \"flux\" has no effect: sigma is drawn without a shift");
        let huber = warned(|settings| settings.huber_schedule = HuberSchedule::Snr);
        assert_eq!(huber, "huber_schedule = \"snr\" has no effect: loss_type is \"mse\"");
        let scheme = |settings: &mut FlowMatchingSettings| {
            settings.loss_weighting_scheme = LossWeightingScheme::SigmaSqrt;
        };
        let mut settings = FlowMatchingSettings::default();
        scheme(&mut settings);
        assert!(settings.warnings()[0].contains("up to 1e10 with sigma_min = 0"), "{settings:?}");
        settings.sigma_min = 0.02;
        assert!(settings.warnings().is_empty());
    }
}
