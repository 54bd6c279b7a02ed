//! `[compute]`: the kernels by which models compute.

use crate::libtorch;
use crate::ops::{self, Kernels};
use crate::settings::{choice, settings};

settings! {
    /// `[compute]`: the kernels by which models compute.
    pub struct ComputeSettings {
        /// Attention on GPUs; `auto`: libtorch's choice without cuDNN's kernels, `cudnn`: with
        /// them.
        pub attention: AttentionKernels = AttentionKernels::Auto;
        /// Operations between products; `fused`: one pass over memory where there is one, `plain`:
        /// libtorch's operators.
        pub kernels: Kernels = Kernels::Fused;
    }
}

choice! {
    /// Kernels of attention among which libtorch chooses on a GPU.
    pub enum AttentionKernels {
        /// All but cuDNN's: on an H200 their backward pass,
        /// `cudnn_generated_fort_native_sdpa_sm90_flash_bprop` of cuDNN 9.19, ended the first step
        /// of FLUX in bfloat16 by an illegal memory access.
        "auto" => Auto,
        /// cuDNN's, too, which libtorch then prefers to the others.
        "cudnn" => Cudnn,
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
