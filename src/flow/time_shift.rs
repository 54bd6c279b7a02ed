//! Shifts timesteps towards noise, by the number of image tokens or not, and the loss weight for
//! it: two functions of the reference's `time_shift_utils`, and the rules of published models.

use tch::Tensor;

use crate::settings::choice;

/// Returns `shift / (shift + (1/u − 1))`: a larger shift gives more weight to high sigma; 1 leaves
/// `u` unchanged.
///
/// # Shapes
/// `u`: any, in `[0, 1]`; 0 maps to 0 and 1 to 1. Returns the same shape and kind.
///
/// Source: Esser et al. 2024, arXiv:2403.03206, eq. 23, in the reference's form.
pub fn shifted(u: &Tensor, shift: f64) -> Tensor {
    // PyTorch computes scalar / tensor as reciprocal · scalar; its two roundings are repeated here
    // to agree bit for bit.
    (u.reciprocal() - 1.0 + shift).reciprocal() * shift
}

/// Does as [`shifted`] for one number above 0.
pub(super) fn shifted_number(u: f64, shift: f64) -> f64 {
    shift / (shift + (1.0 / u - 1.0))
}

/// Returns the `u` that [`shifted`] maps to `sigma`.
pub fn unshifted(sigma: f64, shift: f64) -> f64 {
    sigma / (sigma + shift * (1.0 - sigma))
}

choice! {
    /// The rule by which [`time_shift`] finds its shift: the reference's three under its names, and
    /// those by which models were published.
    #[derive(Default)]
    pub enum ShiftType {
        /// [`TimeShift::constant`], whatever the number of tokens.
        #[default]
        "constant" => Constant,
        /// `exp` of a line through (0, `base_shift`) and (4096, `max_shift`) tokens, not clamped.
        "linear" => Linear,
        /// `max(1, 3·sqrt(tokens / 128²))`.
        "sqrt" => Sqrt,
        /// `exp` of a line through (256, `base_shift`) and (4096, `max_shift`) tokens, not clamped.
        "flux" => Flux,
        /// `exp` of a line through (256, 0.5) and (8192, 0.9) tokens, not clamped.
        "qwen_image" => QwenImage,
        /// FLUX.2's fit for 50 steps, which is that of any number of steps above 4300 tokens.
        "flux2" => Flux2,
    }
}

/// Number of steps of FLUX.2's pipeline, unless it is given another.
const FLUX2_STEPS: f64 = 50.0;

/// Arguments of [`time_shift`] with the reference's defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimeShift {
    pub shift_type: ShiftType,
    /// For `linear`: the logarithm of the shift at 0 tokens; for `flux` at 256.
    pub base_shift: f64,
    /// For `linear` and `flux`: the logarithm of the shift at 4096 tokens.
    pub max_shift: f64,
    /// For `constant`: the shift.
    pub constant: f64,
}

impl Default for TimeShift {
    fn default() -> Self {
        TimeShift {
            shift_type: ShiftType::Constant,
            base_shift: 0.5,
            max_shift: 1.15,
            constant: 3.0,
        }
    }
}

impl TimeShift {
    /// Returns the shift for a sequence of this many image tokens.
    pub fn shift(&self, image_seq_len: i64) -> f64 {
        let tokens = image_seq_len as f64;
        match self.shift_type {
            ShiftType::Linear => {
                (self.base_shift + (self.max_shift - self.base_shift) * (tokens / 4096.0)).exp()
            }
            ShiftType::Sqrt => (3.0 * (tokens / (128.0 * 128.0)).sqrt()).max(1.0),
            ShiftType::Constant => self.constant,
            ShiftType::Flux => {
                let high = (4096.0, self.max_shift);
                shift_between(image_seq_len, (256.0, self.base_shift), high)
            }
            ShiftType::QwenImage => shift_between(image_seq_len, (256.0, 0.5), (8192.0, 0.9)),
            ShiftType::Flux2 => empirical_mu(tokens, FLUX2_STEPS).exp(),
        }
    }
}

/// Returns the shift whose logarithm lies at `image_seq_len` on the line through two points
/// (tokens, logarithm).
pub fn shift_between(image_seq_len: i64, low: (f64, f64), high: (f64, f64)) -> f64 {
    (low.1 + (high.1 - low.1) / (high.0 - low.0) * (image_seq_len as f64 - low.0)).exp()
}

/// Interpolates between fits for 10 and for 200 steps; above 4300 tokens the fit for 200 applies to
/// any number of steps.
///
/// Source: `compute_empirical_mu` of FLUX.2's pipeline in diffusers 0.42.1.
pub(super) fn empirical_mu(tokens: f64, steps: f64) -> f64 {
    let at_200 = 0.000_169_27 * tokens + 0.456_666_66;
    if tokens > 4300.0 {
        return at_200;
    }
    let at_10 = 8.738_095_24e-5 * tokens + 1.898_333_33;
    at_200 + (at_200 - at_10) / 190.0 * (steps - 200.0)
}

/// Returns timesteps as sigmas, shifted for the length of the image sequence.
///
/// # Shapes
/// `t`: any, in `[0, 1]`. Returns the same shape and kind.
pub fn time_shift(t: &Tensor, image_seq_len: i64, arguments: TimeShift) -> Tensor {
    shifted(t, arguments.shift(image_seq_len))
}

/// The slope of [`get_flow_match_loss_weight`]; 3 by default, as in the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightShift(pub f64);

impl Default for WeightShift {
    fn default() -> Self {
        WeightShift(3.0)
    }
}

/// Returns `1 + shift·sigma`, with the shape and kind of `sigma`: more weight to noisier samples.
pub fn get_flow_match_loss_weight(sigma: &Tensor, shift: WeightShift) -> Tensor {
    (sigma * shift.0) + 1.0
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    // Expected values were computed in f64 from the formulas, independently of both
    // implementations.

    fn shifted_number(u: f64, shift: f64) -> f64 {
        shifted(&Tensor::from_slice(&[u]), shift).double_value(&[0])
    }

    #[test]
    fn shifts_have_the_specified_values() {
        for (shift, u, expected) in [
            (3.0, 0.5, 0.75),
            (2.5, 0.5, 0.714_286),
            (2.23, 0.5, 0.690_402),
            (0.5, 0.5, 0.333_333),
            (3.0, 0.0, 0.0),
            (3.0, 1.0, 1.0),
        ] {
            assert!((shifted_number(u, shift) - expected).abs() < 1e-6, "S({shift}, {u})");
        }
    }

    #[test]
    fn sequence_lengths_choose_the_specified_shifts() {
        for (tokens, expected) in [(256, 1.717_080), (1024, 1.939_635), (4096, 3.158_193)] {
            let linear = TimeShift { shift_type: ShiftType::Linear, ..TimeShift::default() };
            assert!((linear.shift(tokens) - expected).abs() < 1e-6, "linear {tokens}");
        }
        for (tokens, expected) in
            [(1820, 1.0), (1821, 1.000_153), (4096, 1.5), (16384, 3.0), (32760, 4.242_123)]
        {
            let sqrt = TimeShift { shift_type: ShiftType::Sqrt, ..TimeShift::default() };
            assert!((sqrt.shift(tokens) - expected).abs() < 1e-6, "sqrt {tokens}");
        }
    }

    #[test]
    fn the_lines_of_published_models_pass_through_their_points() {
        for (shift_type, points) in [
            (ShiftType::Flux, [(256, 0.5), (4096, 1.15), (8192, 1.15 + 0.65 * 4096.0 / 3840.0)]),
            (ShiftType::QwenImage, [(256, 0.5), (8192, 0.9), (4224, 0.7)]),
        ] {
            let rule = TimeShift { shift_type, ..TimeShift::default() };
            for (tokens, mu) in points {
                assert!((rule.shift(tokens).ln() - mu).abs() < 1e-12, "{shift_type:?} {tokens}");
            }
        }
        let other = TimeShift { shift_type: ShiftType::Flux, max_shift: 0.5, ..Default::default() };
        assert!((other.shift(4096).ln() - 0.5).abs() < 1e-12, "a line of no slope");
    }

    #[test]
    fn many_tokens_make_the_number_of_steps_irrelevant() {
        assert_eq!(empirical_mu(4301.0, 10.0), empirical_mu(4301.0, 50.0));
        assert!(
            empirical_mu(4300.0, 10.0) > empirical_mu(4300.0, 50.0),
            "fewer steps linger longer at noise"
        );
        let rule = TimeShift { shift_type: ShiftType::Flux2, ..TimeShift::default() };
        assert_eq!(rule.shift(1024), empirical_mu(1024.0, 50.0).exp());
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
        assert_eq!(time_shift(&half, 4096, TimeShift::default()).kind(), Kind::BFloat16);
    }

    #[test]
    fn the_documented_defaults_are_the_defaults() {
        let half = Tensor::from_slice(&[0.5f64]);
        assert_eq!(time_shift(&half, 4096, TimeShift::default()).double_value(&[0]), 0.75);
        assert_eq!(
            get_flow_match_loss_weight(&half, WeightShift::default()).double_value(&[0]),
            2.5
        );
        assert_eq!("sqrt".parse(), Ok(ShiftType::Sqrt));
        assert_eq!(
            "cubic".parse::<ShiftType>(),
            Err("unknown value `cubic`; expected one of constant, linear, sqrt, flux, qwen_image, flux2".into())
        );
    }
}
