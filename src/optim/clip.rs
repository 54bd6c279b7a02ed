//! Gradient clipping by the global norm.

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

    #[test]
    fn a_long_gradient_comes_down_to_the_bound_and_a_short_one_stays() {
        assert!((coefficient(5.0, 1.0) - 0.2).abs() < 1e-6);
        assert_eq!(coefficient(5.0, 10.0), 1.0);
    }

    #[test]
    fn a_bound_of_zero_clips_nothing() {
        assert_eq!(coefficient(5.0, 0.0), 1.0);
        assert_eq!(coefficient(0.0, 0.0), 1.0);
    }
}
