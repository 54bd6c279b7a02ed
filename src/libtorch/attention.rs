//! Backends of libtorch's scaled dot-product attention.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ffi;

/// A backend of libtorch's scaled dot-product attention. Its discriminant is libtorch's number
/// (`at::SDPBackend`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionBackend {
    /// A chain of libtorch's operators (`math`), which takes every input on every device.
    Plain = 0,
    /// FlashAttention-2; on a CPU, libtorch's own fused kernel.
    Flash = 1,
    /// Kernels of xFormers (`mem_efficient`).
    Efficient = 2,
    /// Kernels that cuDNN makes for each shape.
    Cudnn = 3,
}

use AttentionBackend::{Cudnn, Efficient, Flash, Plain};

impl AttentionBackend {
    /// All backends, in the order in which one of several equally fast ones is chosen.
    pub const ALL: [AttentionBackend; 4] = [Flash, Cudnn, Efficient, Plain];

    /// The backend's name in the configuration and in messages.
    pub fn word(self) -> &'static str {
        match self {
            Plain => "plain",
            Flash => "flash",
            Efficient => "efficient",
            Cudnn => "cudnn",
        }
    }

    /// The backend of libtorch's number.
    pub fn numbered(number: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|backend| *backend as i64 == number)
    }
}

impl fmt::Display for AttentionBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Permits these backends and no others, for the whole process and from the next attention on, on
/// CPUs as on GPUs. libtorch itself begins with all of them.
pub fn permit_attention(backends: &[AttentionBackend]) {
    let bits = backends.iter().fold(0, |bits, backend| bits | 1 << *backend as u32);
    ffi::fm_dist_permit_attention(bits);
}

/// Makes libtorch ask all other permitted backends before [`AttentionBackend::Plain`] on GPUs.
///
/// # Ordering
/// The first attention on a GPU, or the first question for its backend, sets libtorch's default
/// order: an order set before it is lost.
pub fn prefer_fused_attention() {
    ffi::fm_dist_prefer_fused_attention();
}
