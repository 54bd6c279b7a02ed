//! The path between data and noise.

use tch::{Kind, Tensor};

use crate::ops::{Noising, apply};

/// Straight lines at constant speed.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinearInterpolationSchedule;

impl LinearInterpolationSchedule {
    /// Returns the point on the straight path from `x0` (data) to `x1` (noise).
    ///
    /// # Shapes
    /// `x0`: `[B, …]`; `x1`: the same, f32; `sigma`: `[B]` f32 in `[0, 1]`, 0 = data. Returns the
    /// shape and kind of `x0`.
    /// # Panics
    /// If the batch sizes differ (a bug in the caller).
    ///
    /// Source: Lipman et al. 2023, arXiv:2210.02747, eq. 20–23, time reversed.
    pub fn forward(&self, x0: &Tensor, x1: &Tensor, sigma: &Tensor) -> Tensor {
        apply(Noising, [x0, x1, sigma])
    }

    /// Returns the model's target: the velocity along the path, noise − data, f32.
    pub fn velocity(&self, x0: &Tensor, x1: &Tensor) -> Tensor {
        // The wider kind is that of the difference.
        x1.to_kind(Kind::Float) - x0
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::rng::{Key, Purpose};
    use crate::tensor::broadcast_to_rank;

    #[test]
    fn data_and_velocity_come_back_from_any_point_of_the_path() {
        let double = (Kind::Double, Device::Cpu);
        let (data, noise, sigma) = Key::new(1, Purpose::Test).seeded(|| {
            (
                Tensor::randn([3, 2, 4, 4], double),
                Tensor::randn([3, 2, 4, 4], double),
                Tensor::rand([3], double),
            )
        });
        let point = LinearInterpolationSchedule.forward(&data, &noise, &sigma);
        let velocity = &noise - &data;
        let back = point - broadcast_to_rank(&sigma, 4) * velocity;
        // f64 rounding of numbers below 10.
        assert!((back - data).abs().max().double_value(&[]) < 1e-14);
    }

    #[test]
    fn the_ends_of_the_path_are_exact() {
        let float = (Kind::Float, Device::Cpu);
        let (data, noise) = Key::new(2, Purpose::Test)
            .seeded(|| (Tensor::randn([2, 3], float), Tensor::randn([2, 3], float)));
        let point_at = |sigma: f32| {
            LinearInterpolationSchedule.forward(&data, &noise, &Tensor::from_slice(&[sigma, sigma]))
        };
        assert!(point_at(0.0).equal(&data) && point_at(1.0).equal(&noise));
    }
}
