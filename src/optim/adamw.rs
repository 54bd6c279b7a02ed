//! Adam with decoupled weight decay.

use tch::no_grad;

use super::{Optimizer, Slice};
use crate::settings::{Keys, Settings};

/// Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; rounding follows `torch.optim.AdamW`, except that decay
/// leaves parameters of one axis (biases, norms) alone.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl Settings for AdamW {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.number(
            "lr",
            &mut self.lr,
            0.0..=10.0,
            "Peak learning rate, scaled by the schedule; 1e-4 trains from scratch, 1e-5 fine-tunes.",
        );
        keys.number("beta1", &mut self.beta1, 0.0..1.0, "Decay of the gradient's running mean.");
        keys.number("beta2", &mut self.beta2, 0.0..1.0, "Decay of the squared gradient's running mean; 0.99 forgets spikes sooner.");
        keys.number("eps", &mut self.eps, 0.0..=1.0, "Added to the root of the second moment.");
        keys.number(
            "weight_decay",
            &mut self.weight_decay,
            0.0..=10.0,
            "Share of a weight matrix taken off each step, times the learning rate.",
        );
    }
}

impl Optimizer for AdamW {
    fn lr(&self) -> f64 {
        self.lr
    }

    fn state_names(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    fn update(&self, slice: Slice<'_>, lr: f64, step: u64) {
        let Slice { params, gradient, state, decayed } = slice;
        let [exp_avg, exp_avg_sq] = state else { panic!("AdamW keeps two tensors a slice, found {}", state.len()) };
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        no_grad(|| {
            for &(offset, length) in decayed {
                let _ = params.narrow(0, offset, length).g_mul_scalar_(1.0 - lr * self.weight_decay);
            }
            let _ = exp_avg.lerp_(gradient, 1.0 - self.beta1);
            let _ = exp_avg_sq.g_mul_scalar_(self.beta2).addcmul_(&(gradient * (1.0 - self.beta2)), gradient);
            // One buffer serves root, denominator and quotient.
            let mut denominator = exp_avg_sq.sqrt();
            let _ = denominator.g_div_scalar_(correction(self.beta2).sqrt()).g_add_scalar_(self.eps);
            let _ = denominator.reciprocal_().g_mul_(exp_avg).g_mul_scalar_(-lr / correction(self.beta1));
            *params += denominator;
        });
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    #[test]
    fn the_first_step_moves_each_parameter_by_the_learning_rate_against_its_gradient() {
        let adamw = AdamW { weight_decay: 0.0, ..AdamW::default() };
        let mut params = Tensor::from_slice(&[1.0f32, 1.0, 1.0]);
        let gradient = Tensor::from_slice(&[0.5f32, -2.0, 0.0]);
        let mut state = [params.zeros_like(), params.zeros_like()];
        adamw.update(Slice { params: &mut params, gradient: &gradient, state: &mut state, decayed: &[] }, 0.1, 1);
        let moved = Vec::<f32>::try_from(params).expect("f32");
        assert!((moved[0] - 0.9).abs() < 1e-6 && (moved[1] - 1.1).abs() < 1e-6 && moved[2] == 1.0, "{moved:?}");
    }

    #[test]
    fn decay_touches_only_its_runs() {
        let adamw = AdamW { weight_decay: 0.5, ..AdamW::default() };
        let mut params = Tensor::from_slice(&[1.0f32, 1.0, 1.0]);
        let gradient = params.zeros_like();
        let mut state = [params.zeros_like(), params.zeros_like()];
        adamw.update(Slice { params: &mut params, gradient: &gradient, state: &mut state, decayed: &[(1, 1)] }, 0.1, 1);
        assert_eq!(Vec::<f32>::try_from(params).expect("f32"), [1.0, 0.95, 1.0]);
    }
}
