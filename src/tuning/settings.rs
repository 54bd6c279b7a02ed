//! `[lora]`: low-rank changes of linear maps.

use tch::Kind;

use crate::lora::Dialect;
use crate::model::Dtype;
use crate::nn::Init;
use crate::settings::{GlobMap, above, choice, settings};

choice! {
    /// First values of the matrix A; B begins as zeros.
    pub enum LoraInit {
        /// Uniform within ±1/sqrt(inputs), as PEFT begins.
        "kaiming" => Kaiming,
        /// Normal with a standard deviation of 1/rank, as diffusers' scripts begin.
        "gaussian" => Gaussian,
        /// Normal with a variance of 2/(inputs + rank), as NeMo AutoModel begins.
        "xavier" => Xavier,
    }
}

impl LoraInit {
    /// The initialization of A `[rank, inputs]`.
    pub fn of(self, rank: i64, inputs: i64) -> Init {
        match self {
            LoraInit::Kaiming => Init::FanIn { fan_in: inputs },
            LoraInit::Gaussian => Init::Normal { std: 1.0 / rank as f64 },
            LoraInit::Xavier => Init::Normal { std: (2.0 / (inputs + rank) as f64).sqrt() },
        }
    }
}

settings! {
    /// `[lora]`: low-rank changes of linear maps, W + alpha/rank · B · A, which are trained while
    /// the model is frozen.
    pub struct LoraSettings {
        /// Rows of A and columns of B; unset: there is no LoRA, and the model itself is trained.
        pub rank: Option<i64> = None, in 1..=65_536;
        /// The change is scaled by alpha/rank; unset: alpha is the rank.
        pub alpha: Option<f64> = None, in above(0.0);
        /// Modules that are changed, by patterns of diffusers' names or of the ends of names;
        /// "attention": the projections of the family's blocks, "all-linear": every linear map.
        pub target_modules: Vec<String> = vec!["attention".into()];
        /// Modules among them that stay as they are.
        pub exclude_modules: Vec<String>;
        /// Probability with which an input of A is dropped in training.
        pub dropout: f64 = 0.0, in 0.0..1.0;
        /// First values of A; B begins as zeros.
        pub init: LoraInit = LoraInit::Kaiming;
        /// File of a LoRA of any format, or folder of PEFT's, that training begins with, its scale
        /// folded into B; modules that it leaves out begin as `init` says.
        pub init_from: Option<String> = None;
        /// Kind in which A and B are computed with, unset: that of the model; their master values
        /// stay float32.
        pub dtype: Option<Dtype> = None;
        /// Other ranks by patterns of modules; of several that match, the longest counts.
        pub rank_pattern: GlobMap<i64>, in 1..=65_536;
        /// Other alphas by patterns of modules, as in rank_pattern.
        pub alpha_pattern: GlobMap<f64>, in above(0.0);
        /// Scale by alpha/sqrt(rank) instead (rank-stabilized LoRA).
        pub use_rslora: bool = false;
        /// Train the norm of each row of a changed weight by itself (DoRA).
        pub use_dora: bool = false;
        /// Formats in which each checkpoint holds the LoRA for other programs, too.
        pub export: Vec<Dialect>;
    }
}

impl LoraSettings {
    /// Returns what cannot be as it is, as `(key, reason)`. `model`: the kind of the model's
    /// computation.
    pub fn problems(&self, model: Dtype) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.rank.is_none() && *self != LoraSettings::default() {
            let what =
                "is not set, so that nothing else in [lora] has a meaning; 16 is a usual rank";
            problems.push(("lora.rank", what.to_string()));
        }
        let narrower = self.dtype == Some(Dtype::Bfloat16) && model.kind() == Kind::Float;
        if self.rank.is_some() && narrower {
            let what = "must not be narrower than model.dtype = \"float32\"";
            problems.push(("lora.dtype", what.to_string()));
        }
        problems
    }
}
