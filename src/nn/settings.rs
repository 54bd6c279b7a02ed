//! `[compute]`: the kernels by which models compute.

use crate::libtorch::AttentionBackend;
use crate::ops::Kernels;
use crate::settings::{choice, settings};

settings! {
    /// `[compute]`: the kernels by which models compute.
    pub struct ComputeSettings {
        /// Attention on GPUs; `auto`: the fastest of libtorch's backends that were tried and
        /// compute soundly on this machine.
        pub attention: AttentionKernels = AttentionKernels::Auto;
        /// Operations between products; `fused`: one pass over memory where there is one, `plain`:
        /// libtorch's operators.
        pub kernels: Kernels = Kernels::Fused;
    }
}

choice! {
    /// The backend of attention on a GPU. A CPU has libtorch's own choice.
    pub enum AttentionKernels {
        /// Every backend is tried in a process of its own before the first step.
        "auto" => Auto,
        /// FlashAttention-2: bfloat16, without a mask.
        "flash" => Flash,
        /// cuDNN: bfloat16.
        "cudnn" => Cudnn,
        /// xFormers' memory-efficient attention: every kind, with or without a mask.
        "efficient" => Efficient,
        /// A chain of libtorch's operators.
        "plain" => Plain,
    }
}

impl AttentionKernels {
    /// The named backend; `None` for `auto`.
    pub fn backend(self) -> Option<AttentionBackend> {
        match self {
            AttentionKernels::Auto => None,
            AttentionKernels::Flash => Some(AttentionBackend::Flash),
            AttentionKernels::Cudnn => Some(AttentionBackend::Cudnn),
            AttentionKernels::Efficient => Some(AttentionBackend::Efficient),
            AttentionKernels::Plain => Some(AttentionBackend::Plain),
        }
    }
}
