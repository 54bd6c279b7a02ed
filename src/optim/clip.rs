//! Gradient clipping by the global norm.

use tch::{Device, Kind, Tensor};

/// Elements whose squares are added up in one f32. On a CPU libtorch adds all of a tensor's in a
/// few of them: of 4 million elements the norm was off by 1e-4, and the more the fewer ranks shared
/// them.
const CHUNK: i64 = 1 << 16;

/// Root of the sum of squares over all gradients, a f32 scalar on their device; zero without
/// gradients.
///
/// # Shapes
/// Each gradient: `[P]`.
pub fn global_norm<'t>(gradients: impl Iterator<Item = &'t Tensor>) -> Tensor {
    let norms: Vec<Tensor> = gradients.map(norm).collect();
    if norms.is_empty() {
        return Tensor::zeros([], (Kind::Float, Device::Cpu));
    }
    Tensor::stack(&norms, 0).norm()
}

fn norm(gradient: &Tensor) -> Tensor {
    let (elements, whole) = (gradient.size()[0], gradient.size()[0] / CHUNK * CHUNK);
    if whole == 0 {
        return gradient.norm();
    }
    let chunks = gradient.narrow(0, 0, whole).view([-1, CHUNK]).norm_scalaropt_dim(
        2,
        [1i64].as_slice(),
        false,
    );
    let rest = gradient.narrow(0, whole, elements - whole).norm().view([1]);
    Tensor::cat(&[chunks, rest], 0).norm()
}

/// Factor that brings a gradient of `norm` down to `max_norm`; 1 where it is below, and for a
/// `max_norm` of 0, which clips nothing.
///
/// Source: `torch.nn.utils.clip_grad_norm_`, with its 1e-6 against division by zero.
pub fn coefficient(norm: f64, max_norm: f64) -> f64 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    #[test]
    fn a_long_gradient_comes_down_to_the_bound_and_a_short_one_stays() {
        let gradients = [Tensor::from_slice(&[3.0f32, 0.0]), Tensor::from_slice(&[4.0f32])];
        let norm = global_norm(gradients.iter());
        assert!((norm.double_value(&[]) - 5.0).abs() < 1e-6);
        assert!((coefficient(5.0, 1.0) - 0.2).abs() < 1e-6);
        assert_eq!(coefficient(5.0, 10.0), 1.0);
    }

    #[test]
    fn the_norm_of_millions_of_elements_is_right_to_f32_rounding() {
        let gradient = Key::new(5, Purpose::Test)
            .seeded(|| Tensor::randn([(1 << 22) + 1234], (Kind::Float, Device::Cpu)))
            * 1e-3;
        let expected = gradient.to_kind(Kind::Double).norm().double_value(&[]);
        let found = global_norm([&gradient].into_iter()).double_value(&[]);
        assert!((found / expected - 1.0).abs() < 2e-6, "{found} and {expected}");
    }

    #[test]
    fn a_bound_of_zero_clips_nothing() {
        assert_eq!(coefficient(5.0, 0.0), 1.0);
        assert_eq!(coefficient(0.0, 0.0), 1.0);
    }
}
