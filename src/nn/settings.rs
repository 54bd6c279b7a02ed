//! `[compute]`: the kernels by which models compute.

use crate::libtorch;
use crate::ops::{self, Kernels};
use crate::settings::{Choice, Keys, Settings};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct ComputeSettings {
    pub attention: AttentionKernels,
    pub kernels: Kernels,
}

/// Kernels of attention among which libtorch chooses on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionKernels {
    /// All but cuDNN's: on an H200 their backward pass,
    /// `cudnn_generated_fort_native_sdpa_sm90_flash_bprop` of cuDNN 9.19, ended the first step of
    /// FLUX in bfloat16 by an illegal memory access.
    #[default]
    Auto,
    /// cuDNN's, too, which libtorch then prefers to the others.
    Cudnn,
}

impl Choice for AttentionKernels {
    const ALL: &'static [(&'static str, Self)] =
        &[("auto", AttentionKernels::Auto), ("cudnn", AttentionKernels::Cudnn)];
}

impl Settings for ComputeSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        let attention = "Attention on GPUs; `auto`: libtorch's choice without cuDNN's kernels, `cudnn`: with them.";
        keys.choice("attention", &mut self.attention, attention);
        let kernels = "Operations between products; `fused`: one pass over memory where there is one, `plain`: libtorch's operators.";
        keys.choice("kernels", &mut self.kernels, kernels);
    }
}

impl ComputeSettings {
    /// Sets libtorch's own switches and chooses between single passes and libtorch's operators, for
    /// the whole process.
    ///
    /// # Ordering
    /// To be called before the first operation and after libtorch's number of threads was set.
    pub fn apply(&self) {
        libtorch::allow_cudnn_attention(self.attention == AttentionKernels::Cudnn);
        ops::choose(self.kernels);
    }
}
