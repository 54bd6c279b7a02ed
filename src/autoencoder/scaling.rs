//! Between the latents of an autoencoder and those of a model.

use tch::{Kind, Tensor};

/// A shift and a factor for each channel, perhaps after blocks of latents became channels.
#[derive(Debug)]
pub struct Scaling {
    /// `[C]`, or `[1]` for all channels alike; f32, as is the factor.
    shift: Tensor,
    factor: Tensor,
    /// Side of the blocks.
    patch: i64,
}

impl Scaling {
    /// A model's latents are `(z - shift) * factor` with one number of each for all channels, or
    /// one for each channel.
    pub(super) fn new(shift: &[f64], factor: &[f64]) -> Self {
        let [shift, factor] =
            [shift, factor].map(|numbers| Tensor::from_slice(numbers).to_kind(Kind::Float));
        Scaling { shift, factor, patch: 1 }
    }

    /// A model's latents have mean 0 and variance 1, where the autoencoder's have `mean` and
    /// `variance` `[C · patch²]` in blocks of side `patch`.
    pub(super) fn of_blocks(patch: i64, mean: &Tensor, variance: &Tensor, epsilon: f64) -> Self {
        let [mean, variance] = [mean, variance].map(|tensor| tensor.to_kind(Kind::Float));
        Scaling { shift: mean, factor: (variance + epsilon).rsqrt(), patch }
    }

    /// # Shapes
    /// `latents`: an autoencoder's, `[B, C, (F,) H, W]`. Returns a model's, f32.
    pub(super) fn to_model(&self, latents: &Tensor) -> Tensor {
        let latents = latents.to_kind(Kind::Float);
        let latents = match self.patch {
            1 => latents,
            patch => latents.pixel_unshuffle(patch),
        };
        let [shift, factor] = self.broadcast(&latents);
        (latents - shift) * factor
    }

    /// # Shapes
    /// `latents`: a model's, `[B, C, (F,) H, W]`. Returns an autoencoder's, f32.
    pub(super) fn to_autoencoder(&self, latents: &Tensor) -> Tensor {
        let [shift, factor] = self.broadcast(latents);
        let latents = latents.to_kind(Kind::Float) / factor + shift;
        match self.patch {
            1 => latents,
            patch => latents.pixel_shuffle(patch),
        }
    }

    /// Shift and factor on the device of `latents`, in a shape that fits them.
    fn broadcast(&self, latents: &Tensor) -> [Tensor; 2] {
        let mut shape = vec![1; latents.dim()];
        shape[1] = -1;
        [&self.shift, &self.factor]
            .map(|numbers| numbers.to_device(latents.device()).view(shape.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn a_models_latents_become_the_autoencoders_again() {
        let latents = Tensor::arange(2 * 4 * 4 * 6, (Kind::Float, Device::Cpu)).view([2, 4, 4, 6]);
        let numbers = Tensor::arange(16, (Kind::Float, Device::Cpu));
        let scalings = [
            Scaling::new(&[0.5], &[2.0]),
            Scaling::new(&[1.0, 2.0, 3.0, 4.0], &[0.5, 1.0, 2.0, 4.0]),
            Scaling::of_blocks(2, &numbers, &(&numbers + 1.0), 1e-4),
        ];
        for scaling in scalings {
            let back = scaling.to_autoencoder(&scaling.to_model(&latents));
            assert!(back.allclose(&latents, 1e-5, 1e-5, false));
        }
    }

    #[test]
    fn channels_of_a_block_are_channel_row_column() {
        let latents = Tensor::arange(2 * 2 * 2, (Kind::Float, Device::Cpu)).view([1, 2, 2, 2]);
        let numbers = Tensor::zeros([8], (Kind::Float, Device::Cpu));
        let scaling = Scaling::of_blocks(2, &numbers, &(&numbers + 1.0), 0.0);
        let found = scaling.to_model(&latents);
        assert_eq!(found.size(), [1, 8, 1, 1]);
        assert_eq!(
            Vec::<f32>::try_from(found.flatten(0, -1)).unwrap(),
            [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        );
    }
}
