//! Gradient clipping by the global norm.

use tch::{Kind, Tensor};

/// Root of the sum of squares over all gradients, a f32 scalar on their device; zero without gradients.
pub fn global_norm<'t>(gradients: impl Iterator<Item = &'t Tensor>) -> Tensor {
    let norms: Vec<Tensor> = gradients.map(|gradient| gradient.norm()).collect();
    if norms.is_empty() {
        return Tensor::zeros([], (Kind::Float, tch::Device::Cpu));
    }
    Tensor::stack(&norms, 0).norm()
}

/// Factor that brings a gradient of `norm` down to `max_norm`; 1 where it is below, and for a `max_norm` of 0, which clips nothing.
///
/// Source: `torch.nn.utils.clip_grad_norm_`, with its 1e-6 against division by zero.
pub fn coefficient(norm: f64, max_norm: f64) -> f64 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_gradient_comes_down_to_the_bound_and_a_short_one_stays() {
        let gradients = [Tensor::from_slice(&[3.0f32, 0.0]), Tensor::from_slice(&[4.0f32])];
        let norm = global_norm(gradients.iter());
        assert!((norm.double_value(&[]) - 5.0).abs() < 1e-6);
        assert!((coefficient(5.0, 1.0) - 0.2).abs() < 1e-6);
        assert_eq!(coefficient(5.0, 10.0), 1.0);
    }

    #[test]
    fn a_bound_of_zero_clips_nothing() {
        assert_eq!(coefficient(5.0, 0.0), 1.0);
        assert_eq!(coefficient(0.0, 0.0), 1.0);
    }
}
