//! `[sampling]`: what is chosen anew for each generation; what the family prescribes comes from its
//! adapter.

use crate::flow::Solver;
use crate::settings::settings;

settings! {
    /// `[sampling]`: generation of samples.
    pub struct SamplingSettings {
        /// Steps from noise to data.
        pub num_steps: i64 = 50, in 1..=10_000;
        /// Classifier-free guidance (1 is none, at half the cost), or what a model that embeds it
        /// is fed; 0: 1, or the adapter's own.
        pub guidance_scale: f64 = 0.0, in 0.0..=100.0;
        /// Classifier-free guidance away from negative conditions, on top of an embedded one; 1 is
        /// none.
        pub true_cfg_scale: f64 = 1.0, in 0.0..=100.0;
        /// Constant shift of the noise levels towards noise; 0: the pipeline's, or the family's own
        /// way.
        pub shift: f64 = 0.0, in 0.0..=100.0;
        /// The way of a step; unset: the pipeline's, or the family's own.
        pub solver: Option<Solver> = None;
        /// Samples generated for each of the dataset's conditions.
        pub per_condition: i64 = 10, in 1..=10_000;
        /// Prompts of which a run makes a sample each while it trains; none: no such samples.
        pub prompts: Vec<String>;
        /// The prompt from which guidance leads away; unset: the empty one, where guidance needs
        /// one.
        pub negative_prompt: Option<String> = None;
        /// Folder of the family's published pipeline, with its text encoders and its autoencoder;
        /// the demo's DiT needs none.
        pub pipeline: Option<String> = None;
        /// Steps between samples of the prompts; before the first step and after the last there are
        /// some, too.
        pub every_n_steps: u64 = 500, in 1..;
        /// Width and height of these samples in pixels, and frames of a video; empty: those of the
        /// data's first resolution group.
        pub size: Vec<i64>, in 1..=65_536;
        /// Frames a second of videos; 0: the family's own.
        pub fps: i64 = 0, in 0..=240;
    }
}

impl SamplingSettings {
    /// True if a run makes samples of prompts after this step of so many; step 0 is before the
    /// first.
    pub fn is_due(&self, step: u64, max_steps: u64) -> bool {
        !self.prompts.is_empty() && (step.is_multiple_of(self.every_n_steps) || step == max_steps)
    }

    /// Returns the combinations of settings that no run can honour, as `(key, reason)`.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if !matches!(self.size.len(), 0 | 2 | 3) {
            let what = format!(
                "has {} numbers; expected [width, height] or [width, height, frames]",
                self.size.len()
            );
            problems.push(("sampling.size", what));
        }
        if self.pipeline.as_ref().is_some_and(String::is_empty) {
            problems.push(("sampling.pipeline", "must name a folder".into()));
        }
        problems
    }
}
