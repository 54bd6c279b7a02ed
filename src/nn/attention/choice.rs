//! The backends by which this process computes attention on GPUs.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::Attention;
use crate::libtorch::{AttentionBackend, prefer_fused_attention};

/// The backends by which a process computes attention on GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionChoice {
    pub unmasked: AttentionBackend,
    pub masked: AttentionBackend,
}

static CHOICE: Mutex<AttentionChoice> = Mutex::new(AttentionChoice {
    unmasked: AttentionBackend::Plain,
    masked: AttentionBackend::Plain,
});

/// Chooses for the whole process, from the next attention on. A process that never calls it
/// computes by [`AttentionBackend::Plain`].
pub fn choose(choice: AttentionChoice) {
    *CHOICE.lock().unwrap_or_else(PoisonError::into_inner) = choice;
}

/// Returns the backend for an attention with or without a mask.
pub(super) fn chosen(is_masked: bool) -> AttentionBackend {
    let choice = *CHOICE.lock().unwrap_or_else(PoisonError::into_inner);
    if is_masked { choice.masked } else { choice.unmasked }
}

/// Makes libtorch prefer every other backend to the plain one on `device`. By default cuDNN's comes
/// after it on most GPUs, and would not be taken although it is permitted.
///
/// # Ordering
/// To be called after the device was opened and before the first attention.
pub fn open_on(device: Device) {
    if device.is_cuda() {
        // The first question installs the default order, so that an order set before it is lost.
        let tensor = Tensor::zeros([1, 8, 1, 64], (Kind::BFloat16, device));
        let attention = Attention { query: &tensor, key: &tensor, value: &tensor, mask: None };
        attention.taken_by(AttentionBackend::Plain);
    }
    prefer_fused_attention();
}

#[cfg(test)]
mod tests {
    use super::*;
    use AttentionBackend::{Efficient, Flash, Plain};

    use crate::nn::attention::attend;
    use crate::rng::{Key, Purpose};

    #[test]
    fn a_choice_is_of_one_backend_with_a_mask_and_of_one_without() {
        choose(AttentionChoice { unmasked: Flash, masked: Efficient });
        assert_eq!((chosen(false), chosen(true)), (Flash, Efficient));
    }

    #[test]
    fn a_cpu_has_a_backend_that_is_fused_and_the_plain_one() {
        let draw = || Tensor::randn([2, 16, 2, 8], (Kind::Float, Device::Cpu));
        let tensor = Key::new(1, Purpose::Test).seeded(draw);
        let attention = Attention { query: &tensor, key: &tensor, value: &tensor, mask: None };
        for (asked, taken) in [(Flash, Flash), (Plain, Plain), (Efficient, Plain)] {
            assert_eq!(attention.taken_by(asked), Some(taken), "{asked:?}");
        }
        let (fused, plain) = (attention.by(Flash), attention.by(Plain));
        assert!(!fused.equal(&plain), "two backends that have all bits in common are one");
        assert!(fused.allclose(&plain, 1e-5, 1e-6, false));
        // What libtorch permits by itself.
        crate::libtorch::permit_attention(&AttentionBackend::ALL);
        assert!(attend(&tensor, &tensor, &tensor, None).equal(&fused));
    }
}
