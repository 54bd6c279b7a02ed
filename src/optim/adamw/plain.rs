//! The update by libtorch's operators, on any device: what every faster way is compared with.

use tch::{Kind, no_grad};

use super::Factors;
use crate::optim::{Average, Slice, ema};

/// Rounds as `torch.optim.AdamW` does. Passes over each element: eleven.
pub(super) fn update(slice: Slice<'_>, factors: Factors) {
    let Slice { params, gradient, state, computed, average, decayed, .. } = slice;
    let [exp_avg, exp_avg_sq] = state else {
        panic!("AdamW keeps two tensors a slice, found {}", state.len())
    };
    no_grad(|| {
        let gradient = &(gradient.to_kind(Kind::Float) * factors.gradient);
        for &(offset, length) in decayed {
            let _ = params.narrow(0, offset, length).g_mul_scalar_(factors.decay);
        }
        let _ = exp_avg.lerp_(gradient, 1.0 - factors.beta1);
        let _ = exp_avg_sq
            .g_mul_scalar_(factors.beta2)
            .addcmul_(&(gradient * (1.0 - factors.beta2)), gradient);
        // One buffer serves root, denominator and quotient.
        let mut denominator = exp_avg_sq.sqrt();
        let _ = denominator.g_div_scalar_(factors.root_correction).g_add_scalar_(factors.eps);
        let _ = denominator.reciprocal_().g_mul_(exp_avg).g_mul_scalar_(factors.move_by);
        *params += denominator;
        if let Some(computed) = computed {
            computed.copy_(params);
        }
    });
    if let Some(Average { values, share }) = average {
        ema::advance(values, params, share);
    }
}
