//! `[sampling]`: what is chosen anew for each generation; what the family prescribes comes from its
//! adapter.

use crate::settings::settings;

settings! {
    /// `[sampling]`: generation of samples.
    pub struct SamplingSettings {
        /// Euler steps from noise to data.
        pub num_steps: i64 = 50, in 1..=10_000;
        /// Classifier-free guidance (1 is none, at half the cost), or what a model that embeds it
        /// is fed; 0: 1, or the adapter's own.
        pub guidance_scale: f64 = 0.0, in 0.0..=100.0;
        /// Classifier-free guidance away from negative conditions, on top of an embedded one; 1 is
        /// none.
        pub true_cfg_scale: f64 = 1.0, in 0.0..=100.0;
        /// Constant shift of the noise levels towards noise; 0: the family's own way.
        pub shift: f64 = 0.0, in 0.0..=100.0;
        /// Samples generated for each of the dataset's conditions.
        pub per_condition: i64 = 10, in 1..=10_000;
    }
}
