//! From an encoder's outputs to latents.

use tch::{Kind, Tensor};

use crate::rng::Stream;
use crate::settings::choice;

/// Logarithms of variances are kept within these.
const LOG_VARIANCES: (f64, f64) = (-30.0, 20.0);

choice! {
    /// The latents that stand for a picture or a video.
    pub enum Estimate {
        /// The most probable ones, which are the mean; diffusers calls them the mode, too.
        "mean" => Mean,
        /// Drawn at random from the posterior.
        "sample" => Sample,
    }
}

/// The distribution of the latents: independent normal ones.
#[derive(Debug)]
pub struct Posterior {
    /// `[B, C, (F,) H, W]` in the kind of the computation, as is the logarithm of the variance.
    pub mean: Tensor,
    pub log_variance: Tensor,
}

impl Posterior {
    /// `moments`: `[B, 2C, (F,) H, W]`, means and then logarithms of variances.
    pub(super) fn new(moments: &Tensor) -> Self {
        let [mean, log_variance] = [0, 1].map(|half| moments.chunk(2, 1)[half].shallow_clone());
        let (low, high) = LOG_VARIANCES;
        Posterior { mean, log_variance: log_variance.clamp(low, high) }
    }

    /// Returns latents, f32. Those that are drawn follow from `stream` alone, on any device.
    pub fn latents(&self, estimate: Estimate, stream: &Stream) -> Tensor {
        let mean = self.mean.to_kind(Kind::Float);
        match estimate {
            Estimate::Mean => mean,
            Estimate::Sample => {
                let noise = stream.open().normal(0.0, 1.0, &mean.size()).to_device(mean.device());
                mean + (self.log_variance.to_kind(Kind::Float) * 0.5).exp() * noise
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::rng::{Key, Purpose};

    #[test]
    fn samples_have_the_moments_and_follow_from_their_keys() {
        let full = |value: f64| Tensor::full([2, 1, 100, 100], value, (Kind::Float, Device::Cpu));
        let posterior = Posterior::new(&Tensor::cat(&[full(0.5), full(4f64.ln())], 1));
        let keys: Vec<Key> = (0..2).map(|id| Key::new(9, Purpose::Test).scope(id)).collect();
        let drawn =
            |keys: &[Key]| posterior.latents(Estimate::Sample, &Stream::PerSample(keys.to_vec()));
        let latents = drawn(&keys);
        // Four standard errors of 20,000 draws with a deviation of 2.
        assert!((latents.mean(Kind::Double).double_value(&[]) - 0.5).abs() < 0.057);
        assert!((latents.std(true).double_value(&[]) - 2.0).abs() < 0.04);
        assert!(drawn(&keys).equal(&latents));
        assert!(!latents.get(0).equal(&latents.get(1)));
        assert!(
            posterior.latents(Estimate::Mean, &Stream::TorchSeed(1)).equal(&full(0.5)),
            "the mean needs no draw"
        );
    }

    #[test]
    fn variances_are_kept_within_what_diffusers_allows() {
        let moments = Tensor::from_slice(&[0.0f32, 0.0, -40.0, 25.0]).view([1, 4, 1, 1]);
        let kept = Posterior::new(&moments).log_variance;
        assert_eq!(Vec::<f32>::try_from(kept.flatten(0, -1)).unwrap(), [-30.0, 20.0]);
    }
}
