//! `[sampling]`: what is chosen anew for each generation; what the family prescribes comes from its
//! adapter.

use crate::settings::{Keys, Settings};

#[derive(Clone, Debug, PartialEq)]
pub struct SamplingSettings {
    pub num_steps: i64,
    /// 0 is the family's own.
    pub guidance_scale: f64,
    /// 1 is none.
    pub true_cfg_scale: f64,
    /// 0 is the family's own.
    pub shift: f64,
    pub per_condition: i64,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        SamplingSettings {
            num_steps: 50,
            guidance_scale: 0.0,
            true_cfg_scale: 1.0,
            shift: 0.0,
            per_condition: 10,
        }
    }
}

impl Settings for SamplingSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.integer(
            "num_steps",
            &mut self.num_steps,
            1..=10_000,
            "Euler steps from noise to data.",
        );
        keys.number(
            "guidance_scale",
            &mut self.guidance_scale,
            0.0..=100.0,
            "Classifier-free guidance (1 is none, at half the cost), or what a model that embeds it is fed; 0: 1, or the adapter's own.",
        );
        keys.number(
            "true_cfg_scale",
            &mut self.true_cfg_scale,
            0.0..=100.0,
            "Classifier-free guidance away from negative conditions, on top of an embedded one; 1 is none.",
        );
        keys.number(
            "shift",
            &mut self.shift,
            0.0..=100.0,
            "Constant shift of the noise levels towards noise; 0: the family's own way.",
        );
        keys.integer(
            "per_condition",
            &mut self.per_condition,
            1..=10_000,
            "Samples generated for each of the dataset's conditions.",
        );
    }
}
