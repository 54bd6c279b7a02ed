//! From noise to data: the learned velocity followed in small steps.

use tch::{Kind, Tensor, no_grad};

use super::time_shift::shifted;
use crate::error::Result;

/// Noise levels from 1 down to 0 in `steps` steps, shifted as in training. `[steps + 1]` f64.
pub fn sigmas(steps: i64, shift: f64) -> Vec<f64> {
    let even = Tensor::linspace(1.0, 0.0, steps + 1, (Kind::Double, tch::Device::Cpu));
    Vec::try_from(shifted(&even, shift)).expect("f64")
}

/// Follows `velocity(x, sigma)` from noise at `sigmas[0]` to data at the last, one Euler step between two levels.
///
/// # Shapes
/// `noise`: `[B, …]` f32. Returns the same.
///
/// Source: Lipman et al. 2023, arXiv:2210.02747, the ODE of eq. 1, time reversed.
pub fn euler(noise: Tensor, sigmas: &[f64], mut velocity: impl FnMut(&Tensor, f64) -> Result<Tensor>) -> Result<Tensor> {
    no_grad(|| {
        sigmas.windows(2).try_fold(noise, |x, pair| {
            let step = velocity(&x, pair[0])?.to_kind(Kind::Float) * (pair[1] - pair[0]);
            Ok(x + step)
        })
    })
}

/// Velocity away from the unconditional one, `scale` times as far as the conditional; 1 is the conditional itself.
///
/// Source: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, in velocities.
pub fn guided(unconditional: &Tensor, conditional: &Tensor, scale: f64) -> Tensor {
    unconditional + (conditional - unconditional) * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    #[test]
    fn a_constant_velocity_is_followed_exactly_to_the_data() {
        let float = (Kind::Float, tch::Device::Cpu);
        let (data, noise) = Key::new(1, Purpose::Test).seeded(|| (Tensor::randn([2, 3], float), Tensor::randn([2, 3], float)));
        let reached = euler(noise.copy(), &sigmas(7, 3.0), |_, _| Ok(&noise - &data)).expect("no error inside");
        // Seven f32 additions of numbers below 10.
        assert!((reached - data).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn levels_fall_from_one_to_zero_and_linger_at_noise_when_shifted() {
        let levels = sigmas(4, 3.0);
        assert_eq!((levels[0], levels[4]), (1.0, 0.0));
        assert!(levels.windows(2).all(|pair| pair[1] < pair[0]) && (levels[2] - 0.75).abs() < 1e-12);
    }
}
