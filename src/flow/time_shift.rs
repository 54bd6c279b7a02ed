//! Timesteps shifted towards noise, and the loss weight that goes with it: two of the reference's `time_shift_utils`.

use tch::Tensor;

/// `shift / (shift + (1/u − 1))`: more weight to high sigma the larger the shift; 1 leaves `u` alone.
///
/// # Shapes
/// `u`: any, in `[0, 1]`; 0 maps to 0 and 1 to 1. Returns the same shape and kind.
///
/// Source: Esser et al. 2024, arXiv:2403.03206, eq. 23, in the reference's form.
pub fn shifted(u: &Tensor, shift: f64) -> Tensor {
    // PyTorch computes scalar / tensor as reciprocal · scalar; two roundings, repeated here to agree bit for bit.
    (u.reciprocal() - 1.0 + shift).reciprocal() * shift
}

/// The `u` that [`shifted`] maps to `sigma`.
pub fn unshifted(sigma: f64, shift: f64) -> f64 {
    sigma / (sigma + shift * (1.0 - sigma))
}

/// How [`time_shift`] chooses its shift.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ShiftType {
    /// `exp` of a line through (0, `base_shift`) and (4096, `max_shift`) tokens, not clamped.
    Linear {
        base_shift: f64,
        max_shift: f64,
    },
    /// `max(1, 3·sqrt(tokens / 128²))`.
    Sqrt,
    Constant(f64),
}

impl ShiftType {
    /// The reference's defaults of each type.
    pub const LINEAR: ShiftType = ShiftType::Linear { base_shift: 0.5, max_shift: 1.15 };
    pub const CONSTANT: ShiftType = ShiftType::Constant(3.0);

    /// The shift for a sequence of that many image tokens.
    pub fn shift(self, image_seq_len: i64) -> f64 {
        let tokens = image_seq_len as f64;
        match self {
            ShiftType::Linear { base_shift, max_shift } => (base_shift + (max_shift - base_shift) * (tokens / 4096.0)).exp(),
            ShiftType::Sqrt => (3.0 * (tokens / (128.0 * 128.0)).sqrt()).max(1.0),
            ShiftType::Constant(shift) => shift,
        }
    }
}

/// Timesteps as sigmas, shifted for the length of the image sequence.
///
/// # Shapes
/// `t`: any, in `[0, 1]`. Returns the same shape and kind.
pub fn time_shift(t: &Tensor, image_seq_len: i64, shift_type: ShiftType) -> Tensor {
    shifted(t, shift_type.shift(image_seq_len))
}

/// `1 + shift·sigma`, the shape and kind of `sigma`: more weight to noisier samples.
pub fn get_flow_match_loss_weight(sigma: &Tensor, shift: f64) -> Tensor {
    (sigma * shift) + 1.0
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    // Expected values were computed in f64 from the formulas, independently of both implementations.

    fn shifted_number(u: f64, shift: f64) -> f64 {
        shifted(&Tensor::from_slice(&[u]), shift).double_value(&[0])
    }

    #[test]
    fn shifts_have_the_specified_values() {
        for (shift, u, expected) in
            [(3.0, 0.5, 0.75), (2.5, 0.5, 0.714_286), (2.23, 0.5, 0.690_402), (0.5, 0.5, 0.333_333), (3.0, 0.0, 0.0), (3.0, 1.0, 1.0)]
        {
            assert!((shifted_number(u, shift) - expected).abs() < 1e-6, "S({shift}, {u})");
        }
    }

    #[test]
    fn sequence_lengths_choose_the_specified_shifts() {
        for (tokens, expected) in [(256, 1.717_080), (1024, 1.939_635), (4096, 3.158_193)] {
            assert!((ShiftType::LINEAR.shift(tokens) - expected).abs() < 1e-6, "linear {tokens}");
        }
        for (tokens, expected) in [(1820, 1.0), (1821, 1.000_153), (4096, 1.5), (16384, 3.0), (32760, 4.242_123)] {
            assert!((ShiftType::Sqrt.shift(tokens) - expected).abs() < 1e-6, "sqrt {tokens}");
        }
    }

    #[test]
    fn unshifted_undoes_shifted() {
        for u in [1e-5, 0.1, 0.5, 0.9, 1.0] {
            assert!((unshifted(shifted_number(u, 3.0), 3.0) - u).abs() < 1e-12);
        }
    }

    #[test]
    fn the_shift_keeps_the_kind() {
        let half = Tensor::from_slice(&[0.5f32]).to_kind(Kind::BFloat16);
        assert_eq!(time_shift(&half, 4096, ShiftType::CONSTANT).kind(), Kind::BFloat16);
    }
}
