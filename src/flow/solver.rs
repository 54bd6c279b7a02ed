//! Integrates the learned velocity from noise to data.

use tch::{Kind, Tensor, no_grad};

use crate::error::Result;

/// Follows `velocity(x, sigma)` from noise at the first of `sigmas` to data at the last, by one
/// Euler step between neighbouring levels.
///
/// # Shapes
/// `noise`: `[B, …]` f32. Returns the same.
///
/// Source: Lipman et al. 2023, arXiv:2210.02747, the ODE of eq. 1, time reversed.
pub fn euler(
    noise: Tensor,
    sigmas: &[f64],
    mut velocity: impl FnMut(&Tensor, f64) -> Result<Tensor>,
) -> Result<Tensor> {
    no_grad(|| {
        sigmas.windows(2).try_fold(noise, |x, pair| {
            let step = velocity(&x, pair[0])?.to_kind(Kind::Float) * (pair[1] - pair[0]);
            Ok(x + step)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{NoiseLevels, Shift};
    use crate::rng::{Key, Purpose};

    #[test]
    fn a_constant_velocity_is_followed_exactly_to_the_data() {
        let float = (Kind::Float, tch::Device::Cpu);
        let (data, noise) = Key::new(1, Purpose::Test)
            .seeded(|| (Tensor::randn([2, 3], float), Tensor::randn([2, 3], float)));
        let reached =
            euler(noise.copy(), &NoiseLevels::even(Shift::Constant(3.0)).sigmas(7), |_, _| {
                Ok(&noise - &data)
            })
            .expect("no error inside");
        // Seven f32 additions of numbers below 10.
        assert!((reached - data).abs().max().double_value(&[]) < 1e-5);
    }
}
