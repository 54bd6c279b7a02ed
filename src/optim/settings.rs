//! `[optimizer]`: the update rule, and the parameters that it treats otherwise.

use crate::optim::OptimizerChoice;
use crate::settings::{GlobMap, choice, settings};

choice! {
    /// Parameters that weight decay applies to.
    pub enum Decay {
        /// Weight matrices and kernels, not biases, norms and tables of one axis.
        "matrices" => Matrices,
        /// All that are trained, as where `torch.optim.AdamW` gets them in one group.
        "all" => All,
    }
}

settings! {
    /// `[optimizer]`: the update rule, and the parameters that it treats otherwise.
    pub struct OptimizerSettings {
        /// Parameters that weight decay applies to: weight "matrices" and kernels, or "all", also
        /// biases and norms.
        pub decay: Decay = Decay::Matrices;
        /// Factors of the learning rate by patterns of parameters' names or of modules'; of several
        /// that match, the longest counts.
        pub lr_factors: GlobMap<f64>, in 0.0..=1000.0;
        /// Factors of the weight decay, as in lr_factors; 0: none.
        pub decay_factors: GlobMap<f64>, in 0.0..=1000.0;
        /// The update rule.
        pub rule: OptimizerChoice, as member;
    }
}
